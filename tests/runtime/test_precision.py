"""Torch's switches are a run's inside it, and afterwards what they were before."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import REGISTRY, root

import jemkit
from jemkit.runtime.precision import Precision, numerics

b = torch.backends
SWITCHES: dict[str, Any] = {
    "all": b, "cuda.matmul": b.cuda.matmul,
    "cudnn": b.cudnn, "cudnn.conv": b.cudnn.conv, "cudnn.rnn": b.cudnn.rnn,
    "mkldnn": b.mkldnn, "mkldnn.matmul": b.mkldnn.matmul, "mkldnn.conv": b.mkldnn.conv,
    "mkldnn.rnn": b.mkldnn.rnn,
}  # fmt: skip

values = st.sampled_from(["ieee", "tf32"])
switches = st.lists(st.tuples(st.sampled_from([*SWITCHES]), values), max_size=5)
older = st.sampled_from([None, "highest", "high", "medium"])
precisions = st.sampled_from(["fp32", "tf32", "bf16"])


def effective() -> dict[str, str]:
    """How every operation multiplies; a product of matrices that nothing sets is in full."""
    values = {name: switch.fp32_precision for name, switch in SWITCHES.items() if "." in name}
    return {name: "ieee" if value == "none" else value for name, value in values.items()}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """The switches as a new process has them, but for a convolution's, which is set to its
    default."""
    reset()


def reset() -> None:
    torch.set_float32_matmul_precision("highest")
    for switch in SWITCHES.values():
        switch.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True


@given(older=older, changed=switches, precision=precisions)
def test_switches_are_put_back(
    older: str | None, changed: list[tuple[str, str]], precision: Precision
) -> None:
    reset()
    if older is not None:
        torch.set_float32_matmul_precision(older)
    for name, value in changed:
        SWITCHES[name].fp32_precision = value
    before = effective()
    with numerics(precision=precision):
        for name, value in effective().items():
            assert value == ("tf32" if precision == "tf32" and "cu" in name else "ieee")
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert effective() == before
    reset()


def test_a_model_may_ask_for_the_older_switches_as_a_new_process_has_them() -> None:
    """In a process of its own: once written, a switch is not what torch begins with."""
    import subprocess
    import sys

    code = (
        "import torch; from jemkit.runtime.precision import numerics\n"
        "b = torch.backends\n"
        "for precision, fast in ('fp32', False), ('tf32', True), ('bf16', False):\n"
        "    with numerics(precision=precision):\n"
        "        assert b.cudnn.allow_tf32 == b.cuda.matmul.allow_tf32 == fast\n"
        "        with b.cudnn.flags(allow_tf32=not fast): pass\n"
        "        assert b.cudnn.conv.fp32_precision == ('tf32' if fast else 'ieee')\n"
        "    assert b.cudnn.conv.fp32_precision == 'tf32' and b.cudnn.allow_tf32\n"
        "    assert not b.cuda.matmul.allow_tf32\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_a_model_is_judged_after_any_of_torchs_switches_was_set(name: str, value: str) -> None:
    SWITCHES[name].fp32_precision = value
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    x, y = torch.full((6, 1, 8, 8), 0.5), torch.arange(6) % 3
    record = jemkit.evaluate(net, (x, y), registry=REGISTRY, only=("accuracy",))  # type: ignore[arg-type]
    assert record.value("clean") == pytest.approx(1 / 3)
    assert SWITCHES[name].fp32_precision == value
    reset()


def test_bf16_on_the_cpu_is_taken_back_for_an_evaluation_and_restored() -> None:
    torch.set_float32_matmul_precision("medium")
    with numerics():
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    reset()


def test_of_torch_only_public_names_are_used() -> None:
    private = re.compile(r"torch\._C\b")
    places = (root() / name for name in ("jemkit", "plugins", "cli"))
    offenders = [
        p for place in places for p in place.rglob("*.py") if private.search(p.read_text())
    ]
    assert not offenders
