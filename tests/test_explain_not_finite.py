"""What is not finite ends in a message that says where it is, not in a file."""

from pathlib import Path

import pytest
import torch

from clipattr.probes import LinearProbe, ProbeRecord, save_probe
from clipattr.sae.files import SaeRecord, save_sae
from tests.test_explain import CLASSES, PROMPTS, SITES, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("explain"))


def save(place: Place, folder: Path, *, bias: float = 0.0, weight: float = 1.0) -> None:
    probe = LinearProbe(16, len(CLASSES)).requires_grad_(False)
    probe.weight.copy_(place.probe.weight)
    probe.weight[1] *= weight
    probe.bias[1] = bias
    save_probe(probe, folder, ProbeRecord(CLASSES, place.record, "cls", "data"))


@pytest.mark.parametrize(
    ("broken", "part"), [({"bias": float("nan")}, "bias"), ({"weight": float("inf")}, "weight")]
)
def test_a_probe(place: Place, tmp_path: Path, broken: dict, part: str, capsys):
    save(place, tmp_path / "broken", **broken)
    choice = [f"probe={tmp_path / 'broken'}", "label=boat"]
    assert place.run("cls", *choice, name="broken") == 2
    said = capsys.readouterr().err
    assert f"{part} holds numbers that are not finite" in said
    assert str(tmp_path / "broken" / "probe.safetensors") in said
    assert not place.path("broken").exists()


def test_an_sae(place: Place, capsys):
    """The score is that of the model, and finite; what the latents do to it is not."""
    sae = place.spliced["spatial"].sae
    W_dec = sae.W_dec.clone()
    with torch.no_grad():
        sae.W_dec[int(place.read("spatial").codes.indices[0, 0, 0])] = torch.nan
    save_sae(sae, place.folder / "broken", SaeRecord(SITES["spatial"].to_json(), place.record, "d"))
    with torch.no_grad():
        sae.W_dec.copy_(W_dec)
    assert place.run("broken", f"prompt={PROMPTS[0]}", name="broken-sae") == 2
    said = capsys.readouterr().err
    assert f"{PROMPTS[0]!r}, at " in said
    assert "the score without latents is nan" in said
    assert not place.path("broken-sae").exists()
