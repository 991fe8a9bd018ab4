"""Which kernels a device gets: Triton's only if they pass the check. No GPU is needed to choose."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from clipattr import sparse
from clipattr.errors import ConfigError
from clipattr.sparse import choice

GPU = torch.device("cuda", 0)
TRITON = choice.EAGER._replace(dot=lambda *arguments: arguments[0])


@pytest.fixture(autouse=True)
def nothing_remembered():
    choice._of_device.cache_clear()
    yield
    choice._of_device.cache_clear()


def checked(monkeypatch: pytest.MonkeyPatch, result: str | None | Exception) -> list[torch.device]:
    """Stand in for the check; the devices that were asked for."""
    asked = []

    def difference(found: object, wanted: object, device: torch.device) -> str | None:
        asked.append(device)
        assert (found, wanted) == (TRITON, choice.EAGER)
        if isinstance(result, Exception):
            raise result
        return result

    stand_in = SimpleNamespace(TRITON=TRITON, difference=difference)
    monkeypatch.setattr(sparse, "check", stand_in, raising=False)
    return asked


def test_the_cpu_never_asks_for_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(choice.VARIABLE, "triton")
    asked = checked(monkeypatch, "anything")
    assert choice.kernels_for(torch.zeros(1)) is choice.EAGER
    assert asked == []


def test_triton_is_used_where_it_passes_and_checked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    asked = checked(monkeypatch, None)
    assert choice._of_device(GPU) is choice._of_device(GPU) is TRITON
    assert asked == [GPU]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("result", "words"),
    [("dot is off by 3", "dot is off by 3"), (RuntimeError("no ptxas"), "RuntimeError: no ptxas")],
)
def test_a_fault_is_told_and_torch_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    result: str | Exception,
    words: str,
):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    checked(monkeypatch, result)
    with caplog.at_level(logging.WARNING):
        assert choice._of_device(GPU) is choice._of_device(GPU) is choice.EAGER
    (record,) = caplog.records
    assert words in record.getMessage()
    assert "CLIPATTR_KERNELS=eager" in record.getMessage()


def test_where_triton_is_asked_for_a_fault_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(choice.VARIABLE, "triton")
    checked(monkeypatch, "dot is off by 3")
    with pytest.raises(ConfigError, match=r"CLIPATTR_KERNELS=triton.*cuda:0.*dot is off by 3"):
        choice._of_device(GPU)


def test_without_triton_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delattr(sparse, "check", raising=False)
    for name in ("check", "triton_topk", "triton_bags"):
        monkeypatch.delitem(sys.modules, f"clipattr.sparse.{name}", raising=False)
        monkeypatch.delattr(sparse, name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING):
        assert choice._of_device(GPU) is choice.EAGER
    assert "triton" in caplog.text


def test_eager_is_not_checked_and_a_typo_is_an_error(monkeypatch: pytest.MonkeyPatch):
    asked = checked(monkeypatch, None)
    monkeypatch.setenv(choice.VARIABLE, "eager")
    assert choice._of_device(GPU) is choice.EAGER
    assert asked == []
    choice._of_device.cache_clear()
    monkeypatch.setenv(choice.VARIABLE, "tritn")
    with pytest.raises(ConfigError, match="tritn: allowed are auto, eager, triton"):
        choice._of_device(GPU)


def test_rows_stay_as_they_are_where_torch_adds_them():
    matrix = torch.ones(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert choice.gathered(matrix) is matrix
