"""Options: what every registered part is made of."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from inspect import getattr_static
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

LARGEST_USUAL = 32  # in 1/255: L-inf radii up to here are whole numbers, which a fraction rounds


class Options(BaseModel):
    """A frozen set of options: fields, TOML keys, JSON schema and `--set` names at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, strict=False
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, given: Any) -> Any:
        """A bool is no number, a number has a size, and a path does not depend on the folder."""
        if not isinstance(given, dict):
            return given
        values, wrong = dict(given), []
        for name, field in cls.model_fields.items():
            kinds, value = kinds_in(field.annotation), values.get(name, field.default)
            if isinstance(value, str) and int in kinds and value.strip().isdecimal():
                value = int(value) if len(value) < 100 else LARGEST
            message = _no_number(value, bools=not kinds & {int, float} or bool in kinds)
            if message:
                mistake = PydanticCustomError("number", message)
                wrong.append(InitErrorDetails(type=mistake, loc=(name,), input=value))
            if Path in kinds and isinstance(value, str | Path) and str(value):
                values[name] = expanded(Path(value)).absolute()
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values

    def unused(self) -> Mapping[str, str]:
        """Options that do nothing as the others stand, each with what it would take: "unless ...".

        A name may be dotted. A person who sets one of them is told so before the first step.
        """
        return {}


def parts_of(part: Any, path: str = "") -> Iterator[tuple[str, Options]]:
    """A part and all that its fields hold, with the dotted paths to them."""
    if isinstance(part, Options):
        yield path, part
        for name in type(part).model_fields:
            yield from parts_of(getattr(part, name), f"{path}.{name}" if path else name)
    elif isinstance(part, tuple | list):
        for item in part:
            yield from parts_of(item, path)
    elif isinstance(part, Mapping):
        for name, item in part.items():
            yield from parts_of(item, f"{path}.{name}")


LARGEST = 2**63  # no number of an option is as large: neither a tensor nor a loop could take it


def _no_number(value: Any, *, bools: bool) -> str:
    """What is wrong with a number, or with those of a list; "" where nothing is."""
    if isinstance(value, bool):
        return "" if bools else "Input should be a number, not true or false"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return f"Input should be less than {LARGEST:,}"
    each = value if isinstance(value, list | tuple) else ()
    return next(filter(None, (_no_number(one, bools=bools) for one in each)), "")


def kinds_in(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of: {int, None} of `int | None`."""
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(value) for value in inner}
    return {annotation} if not inner else {kind for one in inner for kind in kinds_in(one)}


def not_a_fraction(px: float) -> float:
    """A radius in 1/255 of the pixel range; one like 0.031 was surely meant as 8/255."""
    if px < 0:
        raise ValueError("a radius should be greater than or equal to 0")
    if 0 < px < 1:
        raise ValueError(
            f"a radius is given in 1/255 of the pixel range, so 8 for 8/255; {px:g} is probably a "
            f"fraction: write {_in_pixels(px):.4g}"
        )
    return px


def _in_pixels(fraction: float) -> float:
    """A fraction of the range in 1/255: 8 of 0.031, which is 8/255 rounded; 127.5 of 0.5."""
    digits = len(repr(fraction).partition(".")[2])
    whole = round(fraction * 255)
    small = fraction * 255 <= LARGEST_USUAL
    return whole if small and round(whole / 255, digits) == fraction else fraction * 255


Radius = Annotated[float, AfterValidator(not_a_fraction)]
"""A radius in pixels, for every norm: 0, or at least 1/255 of the range."""


class PartOf:
    """Marks a field that holds a part: `sampler: Annotated[Sampler, PartOf("sampler")]`.

    A table `{use = "sgld", noise = 0.01}` is resolved by the registry in the validation context;
    an instance is taken as it is; a dump gives the table back.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def resolve(self, value: Any, source: Any, info: ValidationInfo) -> Any:
        """The part of a table, or an instance as it is; a validation error if it does not fit."""
        about = {"kind": self.kind, "came": type(value).__name__}
        misfit = "expected a {kind}, got {came}"
        if isinstance(value, Mapping):
            table = dict(value)
            if "use" not in table:
                raise PydanticCustomError("part", "wanted `use`, the name of the {kind}", about)
            about["name"] = str(table.pop("use"))
            part, named = _registry(info)[self.kind].named(about["name"])
            value = part.model_validate({**named, **table}, context=info.context)
            misfit = "the {kind} {name} cannot serve here"  # an attack may judge but not train
        if not _serves(value, source):
            raise PydanticCustomError("part", misfit, about)
        return value

    def dump(self, value: Any, info: SerializationInfo) -> Any:
        """The table of a part: its name in `use`, and its options."""
        name = _registry(info)[self.kind].name_of(type(value))
        return {"use": name, **value.model_dump(mode=info.mode, context=info.context)}

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def check(value: Any, info: ValidationInfo) -> Any:
            return self.resolve(value, source, info)

        dump = core_schema.plain_serializer_function_ser_schema(self.dump, info_arg=True)
        return core_schema.with_info_plain_validator_function(check, serialization=dump)

    def __get_pydantic_json_schema__(
        self, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        use = {"type": "string", "description": f"the name of a {self.kind}"}
        return {"type": "object", "required": ["use"], "properties": {"use": use}}


def nearest(name: str, names: Any, rest: str = "") -> str:
    """ " (did you mean 'x'?)" where a name is close, else an empty string; `rest` ends it."""
    near = get_close_matches(name, [str(n) for n in names], n=1)
    return f" (did you mean {near[0] + rest!r}?)" if near else ""


def in_name(part: type[Any], name: str) -> dict[str, str] | None:
    """The options in a part's name, `wrn-28-10`; None where it does not keep to the pattern."""
    _, *values = name.split("-")
    fields: tuple[str, ...] = getattr(part, "positional", ())
    options = dict(zip(fields, values, strict=False))
    numbers = (options[f].isdecimal() for f in options if part.model_fields[f].annotation is int)
    return options if len(values) == len(fields) and all(numbers) else None


def pattern(part: type[Any], word: str) -> str:
    """How a part is named with its options: wrn-DEPTH-WIDTH."""
    return "-".join([word, *(f.upper() for f in getattr(part, "positional", ()))])


def example(part: type[Any], word: str) -> str:
    """A name by the pattern, ", such as wrn-28-10"; empty where options have no defaults."""
    fields = [part.model_fields[f] for f in getattr(part, "positional", ())]
    if not fields or any(field.is_required() for field in fields):
        return ""
    return f", such as {'-'.join([word, *(str(field.default) for field in fields)])}"


def _serves(value: Any, source: Any) -> bool:
    """Whether a part has what its field's type asks for.

    `isinstance` would compute the properties of a protocol, which may read a data set.
    """
    return any(
        all(_has(value, name) for name in _members(kind))
        if getattr(kind, "_is_protocol", False)
        else isinstance(value, kind)
        for kind in _protocols(source)
    )


def _members(protocol: type[Any]) -> set[str]:
    """The names that a protocol asks for."""
    bases = [base for base in protocol.__mro__ if getattr(base, "_is_protocol", False)]
    names = {*(n for base in bases for n in vars(base))}
    names |= {n for base in bases for n in vars(base).get("__annotations__", ())}
    return {name for name in names if not name.startswith("_") or name == "__call__"}


def _has(value: Any, name: str) -> bool:
    try:
        getattr_static(value, name)
    except AttributeError:
        return False
    return True


def _protocols(source: Any) -> tuple[type[Any], ...]:
    """A field's type, or the members of its union, without their parameters."""
    members = (
        get_args(source)
        if isinstance(source, UnionType) or get_origin(source) is Union
        else (source,)
    )
    return tuple(get_origin(member) or member for member in members)


def _registry(info: ValidationInfo | SerializationInfo) -> Any:
    context = info.context or {}
    if "registry" not in context:
        raise PydanticCustomError("part", "a table of a part needs a registry to find its name in")
    return context["registry"]


SIZES = (8, 64)  # the image sizes, in pixels, that the networks are built for


def expanded(path: Path) -> Path:
    """A path whose ~ is the user's home, where there is such a user."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path
