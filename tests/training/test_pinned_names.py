"""Names that a data set of another package gives: used, or refused with what was expected."""

import re
from typing import Any

import pytest
from toys import Toy

from jemkit import MisfitError
from jemkit.splits import Splits
from jemkit.training import pinned


class Listed(Toy):
    """Lists its files and classes as its options say."""

    given: Any = None
    called: Any = ("a", "b", "c")

    @property
    def class_names(self) -> Any:
        return self.called

    def files(self, split: str) -> Any:
        return self.given[split] if isinstance(self.given, dict) else self.given


class Unaware(Toy):
    """Lists its files without being told of which split."""

    def files(self) -> list[str]:
        return ["a.png"]


@pytest.mark.parametrize(
    ("given", "came"),
    [
        (None, "`files('train')` of the data set Listed, of the plug-in test_pinned_names, gives "
               "None; expected a string for each image, the name of its file, in the order of"),
        ("a.png", "gives 'a.png'; expected"),
        (list(range(60)), "gives 0; expected"),
        (["a.png"] * 59 + [None], "gives None; expected"),
        (["a.png"] * 40, "gives 40 names, for at least 60 images; expected"),
        ({"test": ["a.png"] * 30}, "`files('train')` of the data set Listed"),
        ([], "gives 0 names, for at least 60 images; expected"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_refused_with_the_plug_in_and_the_wanted_form(
    given: Any, came: str
) -> None:
    with pytest.raises(MisfitError, match=re.escape(came)) as caught:
        pinned.pin(Splits(Listed(given=given)))
    assert caught.value.exit_code == 3


def test_a_method_that_takes_no_split_is_refused() -> None:
    with pytest.raises(MisfitError, match=r"Unaware.* gives an error, .*takes 1 positional"):
        pinned.pin(Splits(Unaware()))


@pytest.mark.parametrize("called", ["abc", 3, (0, 1, 2)])
def test_class_names_of_another_form_are_refused(called: Any) -> None:
    with pytest.raises(MisfitError, match=r"`class_names` .* expected a string for each class"):
        pinned.class_names(Listed(called=called))


def test_names_of_any_sequence_or_generator_are_taken() -> None:
    named = Listed(given={"train": tuple(f"{i}" for i in range(60)), "test": ["x"] * 30})
    table, details = pinned.pin(Splits(named))
    assert table.classes == ("a", "b", "c")
    assert {*details.names} == {"x", *(f"{i}" for i in range(60))}
