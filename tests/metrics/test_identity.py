"""A model's identity: equal for equal weights, code and attributes, in this process and any."""

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import linear_model

from jemkit import PGD, PixelModel
from jemkit.metrics.identity import code_of, identity_of, version_of
from jemkit.runtime.preemption import PreemptionCheck

FACTOR = 2.0


class Plain(nn.Module):
    """A module whose answer is in an attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return scaled(x)


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def with_default(factor: float) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor, by: float = factor) -> Tensor:
        return x * by

    return f


class Scale:
    """An object with a state of its own."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.by


PAIRS: dict[str, tuple[Any, Any]] = {
    "numbers": (1.0, -1.0),
    "an int and its float": (1, 1.0),
    "texts": ("relu", "tanh"),
    "functions of torch": (torch.sigmoid, torch.tanh),
    "functions of torch.nn": (nn.functional.relu, nn.functional.gelu),
    "closures": (times(1.0), times(2.0)),
    "lambdas": (lambda x: x + 1, lambda x: x - 1),
    "defaults": (with_default(1.0), with_default(2.0)),
    "partials": (functools.partial(torch.clamp, min=0), functools.partial(torch.clamp, min=1)),
    "objects": (Scale(1.0), Scale(2.0)),
    "methods of tensors": (torch.ones(2).add, torch.zeros(2).add),
    "lists": ([1, 2], [2, 1]),
    "dictionaries": ({"a": 1}, {"a": 2}),
    "sets": ({1, 2}, {1, 3}),
    "tensors": (torch.zeros(2), torch.ones(2)),
    "shapes": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "types of tensors": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "modules in a list": ([nn.LeakyReLU(0.1)], [nn.LeakyReLU(0.2)]),
    "registered modules": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "classes": (nn.ReLU, nn.GELU),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_modules_that_differ_in_an_attribute_are_two_models(pair: tuple[Any, Any]) -> None:
    a, b = (identity_of(Plain(held)) for held in pair)
    assert a.unknown == b.unknown == ""
    assert a.sha256 != b.sha256
    assert a == identity_of(Plain(pair[0]))


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [(Plain, "forward", lambda self, x: -x), (sys.modules[__name__], "FACTOR", 3.0)],
)
def test_another_forward_or_another_global_that_it_reads_is_another_model(
    monkeypatch: pytest.MonkeyPatch, target: object, name: str, value: object
) -> None:
    model = Plain(1.0)
    before = identity_of(model)
    monkeypatch.setattr(target, name, value)
    assert identity_of(model) != before


def test_a_forward_of_the_instance_and_a_hook_are_part_of_the_model() -> None:
    own, hooked = Plain(1.0), Plain(1.0)
    before = identity_of(own)
    own.forward = lambda x: -x  # type: ignore[method-assign,assignment]
    hooked.register_forward_hook(lambda module, x, y: -y)
    assert len({before, identity_of(own), identity_of(hooked)}) == 3


def test_weights_and_buffers_that_no_state_dict_has_are_part_of_the_model() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    assert identity_of(one) == identity_of(two)
    for module, value in ((one, 0.0), (two, 1.0)):
        module.register_buffer("mean", torch.full((2,), value), persistent=False)
    assert identity_of(one) != identity_of(two)


def test_the_mode_gradients_and_what_only_watches_are_no_part_of_the_model() -> None:
    model = PixelModel(linear_model(4, 2))
    before = identity_of(model)
    model.eval().requires_grad_(False)
    model.poll = lambda: None
    assert identity_of(model) == before


def test_what_cannot_be_hashed_is_named_and_never_the_same_twice() -> None:
    model = Plain(threading.Lock())
    one, two = identity_of(model), identity_of(model)
    assert one.sha256 != two.sha256
    assert "Plain.held, of type lock" in one.card["identity"]


def test_code_of_ones_own_is_followed_and_that_of_installed_packages_goes_by_its_name() -> None:
    assert version_of("__main__") is None  # its file is pytest's here
    assert version_of(__name__) is None
    assert version_of("torch.nn") == version_of("functools") == version_of("_thread") == ""
    assert version_of("_pytest.mark") is not None


def test_a_module_that_holds_itself_has_an_identity() -> None:
    model = Plain(None)
    model.held = [model, {"me": model}]
    assert identity_of(model).unknown == ""


def test_functions_of_ones_other_modules_are_part_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_constants.py").write_text("FACTOR = 2.0")
    (tmp_path / "net_helpers.py").write_text(
        "import net_constants\nclass Factor:\n    def __call__(self): return net_constants.FACTOR"
    )
    (tmp_path / "net_model.py").write_text(
        "import torch, net_helpers\nclass Net(torch.nn.Module):\n    @torch.no_grad()\n"
        "    def forward(self, x): return self.scaled(x)\n"
        "    def scaled(self, x): return x * net_helpers.Factor()()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = import_module("net_model").Net()
    before = identity_of(model)
    monkeypatch.setattr("net_constants.FACTOR", 3.0)
    assert before.unknown == ""
    assert identity_of(model) != before


def test_a_module_without_its_own_state_is_no_error() -> None:
    model = nn.Linear(2, 2)
    del model.__dict__["_buffers"]
    assert "Linear" in identity_of(model).card["identity"]


class Wired(nn.Module):
    """Two layers of one class, and a constant; `twice` changes the code alone."""

    def __init__(self, seed: int = 0, twice: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.norm(self.first(x)).relu())
        return self.second(h) if self.twice else h + torch.ones(4)


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model.eval(), torch.zeros(2, 4))  # type: ignore[no-untyped-call]


def exported(model: nn.Module) -> Any:
    return torch.export.export(model.eval(), (torch.zeros(2, 4),)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", [traced, exported, torch.jit.script])
def test_a_model_has_one_identity_however_often_it_is_compiled(
    form: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    one = identity_of(form(Wired()))
    assert one.unknown == ""
    assert one == identity_of(form(Wired()))
    assert len({one, identity_of(form(Wired(seed=1))), identity_of(form(Wired(twice=True)))}) == 3
    if form is not exported:
        form(Wired()).save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")  # type: ignore[no-untyped-call]
        assert identity_of(loaded) == one


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(values, values)
def test_attributes_have_one_identity_exactly_where_they_are_equal(a: Any, b: Any) -> None:
    same = repr(ordered(a)) == repr(ordered(b))
    assert (identity_of(Plain(a)) == identity_of(Plain(b))) == same


def ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return "dict", [(key, ordered(value[key])) for key in sorted(value)]
    return [ordered(item) for item in value] if isinstance(value, list) else value


ELSEWHERE = """
import functools, sys, torch
from torch import nn
from jemkit.metrics.identity import identity_of
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.names, self.table = {"a", "b", "c", ("x", 1)}, dict.fromkeys(sys.argv[1], 1)
        self.act = functools.partial(torch.clamp, min=0)
        self.layer = nn.Linear(2, 2)
        nn.init.ones_(self.layer.weight); nn.init.zeros_(self.layer.bias)
    def forward(self, x):
        return self.act(self.layer(x)) if x.shape[0] in {1, 2, 3} else {"y": x}["y"]
print(identity_of(Net()).sha256, identity_of(torch.jit.script(nn.Linear(2, 2).eval()))[1])
"""


def test_a_model_has_one_identity_in_every_process(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(ELSEWHERE)
    messages = {
        subprocess.run(
            [sys.executable, str(code), order],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed, order in (("1", "xyz"), ("2", "zyx"))
    }  # fmt: skip
    assert len(messages) == 1


def test_a_check_for_a_stop_is_no_part_of_the_model() -> None:
    """Through its hook all of a training would be hashed, with each attack of each validation."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    check = PreemptionCheck(lambda: False, lambda: 0)
    alone = identity_of(model)
    with check.passes(model, on=True):
        assert identity_of(model) == alone
        model.register_forward_pre_hook(lambda *_: None)
        assert identity_of(model) != alone


def test_memory_that_runs_out_is_no_unknown_model() -> None:
    class Large:
        def __reduce_ex__(self, protocol: Any) -> Any:
            raise MemoryError

    model = nn.Linear(2, 2)
    model.large = Large()  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        identity_of(model)


def test_a_part_of_a_notebook_is_identified_by_its_code() -> None:
    def defined(result: int) -> Any:
        scope: dict[str, Any] = {"__name__": "a_notebook"}
        exec(f"class Mine:\n    def card(self):\n        return {result}", scope)
        return scope["Mine"]()

    assert code_of(defined(1)) == code_of(defined(1)) != code_of(defined(2))
    assert code_of(PGD()) == ""
