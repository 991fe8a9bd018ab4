"""What torch does to functions works on the two halves: func, compile, autocast, low precision."""

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipattr.clip import Cut, Rest, Site, image_tower
from tests.tower_checks import Subject, difference, image_subject
from tests.towers import build, images_for

# open_clip, timm without and with rotary positions, attention pooling.
NAMES = ("ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32")
SITES = (
    Site(0, "residual", "all"),
    Site(0, "residual_before", "all"),
    Site(0, "heads", "spatial"),
    Site(0, "neurons", "spatial"),
)


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return image_subject(build(request.param))


@pytest.fixture(params=SITES, ids=lambda site: site.stream)
def cut(subject: Subject, request: pytest.FixtureRequest) -> Cut:
    return subject.tower.cut(request.param)


@pytest.fixture
def plain_attention() -> Iterator[None]:
    """torch's fused kernel for CPUs has neither batching rule nor forward derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("plain_attention")
def test_vmap_over_edits_is_the_loop(subject: Subject, cut: Cut):
    x, rest = cut.prefix(subject.inputs)
    edits = torch.stack([x + noise_like(x, seed) for seed in range(3)])
    together = vmap(lambda edited: cut.suffix(edited, rest))(edits)
    difference(together, torch.stack([cut.suffix(edited, rest) for edited in edits]), "vmap")


@pytest.mark.usefixtures("plain_attention")
def test_vmap_over_images_gives_a_gradient_for_each(subject: Subject, cut: Cut):
    x, rest = cut.prefix(subject.inputs)
    residual = torch.zeros(len(x), 0) if rest.residual is None else rest.residual
    direction = noise_like(cut.suffix(x, rest)[0], 7)

    def score(row: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        own = Rest() if rest.residual is None else Rest(others[None])
        return cut.suffix(row[None], own)[0] @ direction

    x = x.requires_grad_()
    (expected,) = torch.autograd.grad((cut.suffix(x, rest) @ direction).sum(), x)
    difference(vmap(grad(score))(x.detach(), residual), expected, "vmap of grad")


@pytest.mark.usefixtures("plain_attention")
# torch compiles a few of its own derivatives with torch.jit, and says that this will end.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_forward_derivative_is_the_backward_one(subject: Subject, cut: Cut):
    """< d, J v > = < J^T d, v >, and J v is the slope of central differences."""
    x, rest = cut.prefix(subject.inputs)
    v = noise_like(x, 8)
    value, forward, *_ = jvp(lambda edited: cut.suffix(edited, rest), (x,), (v,))
    backward = vjp(lambda edited: cut.suffix(edited, rest), x)[1]
    d = noise_like(value, 9)
    torch.testing.assert_close(
        (d * forward).sum(), (backward(d)[0] * v).sum(), rtol=1e-4, atol=1e-4
    )
    step = 1e-2
    slope = (cut.suffix(x + step * v, rest) - cut.suffix(x - step * v, rest)) / (2 * step)
    torch.testing.assert_close(forward, slope, rtol=1e-2, atol=1e-2)


def test_both_halves_compile_without_a_break(subject: Subject, monkeypatch: pytest.MonkeyPatch):
    """As users run it: shapes are checked in tests only, and dynamo cannot trace the checks."""
    cut = subject.tower.cut(Site(0, "heads", "spatial"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    x, rest = torch.compile(cut.prefix, backend="eager", fullgraph=True)(subject.inputs)
    embedding = torch.compile(cut.suffix, backend="eager", fullgraph=True)(x, rest)
    difference(embedding, subject.encode(subject.inputs), "compiled")


def test_autocast_is_that_of_the_model(subject: Subject, cut: Cut):
    exact = subject.encode(subject.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = subject.encode(subject.inputs)
        found = cut.suffix(*cut.prefix(subject.inputs))
    assert found.dtype == expected.dtype == torch.bfloat16
    rounding = (expected - exact).abs().max()
    assert rounding > 1e-3, "autocast did nothing"
    assert (found - expected).abs().max() <= 2 * rounding


# open_clip's own attention pooling stops in mixed precision.
LOW = [(name, f"pure_{kind}") for name in NAMES for kind in ("bf16", "fp16")]
LOW += [(name, kind) for name in NAMES[:3] for kind in ("bf16", "fp16")]


@pytest.mark.parametrize(("name", "precision"), LOW)
def test_low_precision_is_that_of_the_model(name: str, precision: str):
    """Pictures come in fp32; open_clip's users cast them themselves."""
    model: Any = build(name, precision=precision)
    images = images_for(model, 2)
    low = images.to(torch.float16 if "fp16" in precision else torch.bfloat16)
    tower = image_tower(model)
    expected = model.encode_image(low, normalize=False)
    found = [cut.suffix(*cut.prefix(images)) for cut in map(tower.cut, SITES)]
    exact = model.float().encode_image(images, normalize=False)
    rounding = (expected.float() - exact).abs().max()
    assert rounding > 1e-4, "the model is not in low precision"
    for site, embedding in zip(SITES, found, strict=True):
        assert embedding.dtype == expected.dtype, site
        assert (embedding - expected).abs().max() <= 2 * rounding, site
