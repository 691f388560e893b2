"""Where settings come from: reads the file and the environment, and remembers who said what."""

from __future__ import annotations

import difflib
import enum
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from kvstore.errors import InvalidArgument
from kvstore_server.settings import Settings

CONFIG_VARIABLE = "KVSTORE_CONFIG"
_PREFIX = "KVSTORE_"
_ETC_FILE = Path("/etc/kvstore/server.toml")
# Other programs have KVSTORE_* variables too (an orchestrator sets KVSTORE_SERVICE_HOST for a
# service of that name), so only a name this close to a setting's is taken for a mistyped one.
_TYPO_LIKENESS = 0.85
# A cluster's clients have these; on a host with both they are no mistyped settings.
_CLIENTS_VARIABLES = tuple(
    f"{_PREFIX}CLUSTER_{name}"
    for name in ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERTIFICATE", "TLS_KEY")
)


class Kind(enum.StrEnum):
    """The layers of settings, the weakest first."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Origin:
    """Who set a value: a file's path, a variable's or a flag's name; no name for a default."""

    kind: Kind
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The settings in force, the origin of each field, and the file that was read, if any."""

    settings: Settings
    origins: Mapping[str, Origin]
    file: Path | None


def load(flags: Mapping[str, object], config: Path | None = None) -> Loaded:
    """Reads all layers. Creates nothing.

    flags: the settings that were given on the command line, by field name. config: the TOML file;
    None for `$KVSTORE_CONFIG`, else the user's own, else the one in /etc, where they exist.
    `InvalidArgument` names the origin and the field of every bad value.
    """
    file = _find_file(config)
    _refuse_mistyped_variables()
    layers = [
        (Kind.FILE, _read_file(file) if file else {}),
        (Kind.ENVIRONMENT, EnvSettingsSource(Settings)()),
        (Kind.FLAG, dict(flags)),
    ]
    values: dict[str, object] = {}
    origins = {field: Origin(Kind.DEFAULT) for field in Settings.model_fields}
    for kind, layer in layers:
        values.update(layer)
        origins.update({field: _origin(kind, field, file) for field in layer})
    return Loaded(settings=_validate(values, origins), origins=origins, file=file)


def _origin(kind: Kind, field: str, file: Path | None) -> Origin:
    names = {
        Kind.FILE: str(file),
        Kind.ENVIRONMENT: variable_name(field),
        Kind.FLAG: f"--{field.replace('_', '-')}",
    }
    return Origin(kind, names[kind])


def variable_name(field: str) -> str:
    """The environment's name of a setting."""
    return _PREFIX + field.upper()


def _find_file(config: Path | None) -> Path | None:
    if config is not None:
        return _must_be_file(config, "--config")
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return _must_be_file(Path(named), CONFIG_VARIABLE)
    return next((path for path in default_files() if _is_file(path)), None)


def default_files() -> list[Path]:
    """Where a settings file is looked for, in this order, if none is named."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [Path(folder) / "kvstore" / "server.toml", _ETC_FILE]


def _must_be_file(path: Path, named_by: str) -> Path:
    if not _is_file(path):
        raise InvalidArgument(named_by, f"{path} is no file: correct the path or leave it out")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise InvalidArgument(f"file {path}", f"cannot be looked at: {error.strerror}") from None


def _read_file(path: Path) -> dict[str, object]:
    try:
        return TomlConfigSettingsSource(Settings, path)()
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"file {path}", f"is no TOML: {error}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"file {path}", "is no TOML: it must be UTF-8 text") from None
    except OSError as error:
        message = f"cannot be read: {error.strerror}; give this user the right to"
        raise InvalidArgument(f"file {path}", message) from None


def _refuse_mistyped_variables() -> None:
    known = [variable_name(field) for field in Settings.model_fields] + [CONFIG_VARIABLE]
    for name in os.environ:
        if name.startswith(_PREFIX) and name not in (*known, *_CLIENTS_VARIABLES):
            close = difflib.get_close_matches(name, known, 1, _TYPO_LIKENESS)
            if close:
                raise InvalidArgument(f"environment {name}", f"write {close[0]} or unset it")


def _validate(values: dict[str, object], origins: Mapping[str, Origin]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    first, *others = [(origins[_field(problem)], _explain(problem)) for problem in problems]
    rest = [f"{origin}: {message}" for origin, message in others]
    raise InvalidArgument(str(first[0]), "; ".join([first[1], *rest]))


def _field(problem: ErrorDetails) -> str:
    """Which setting it is about. Settings that do not fit together are those of a node."""
    return str(problem["loc"][0]) if problem["loc"] else "node_name"


def _explain(problem: ErrorDetails) -> str:
    field = _field(problem)
    if problem["type"] == "extra_forbidden":
        known = list(Settings.model_fields)
        close = difflib.get_close_matches(field, known, 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        return f"{field} is no setting: {hint}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{field} = {problem['input']!r}: {message}" if problem["loc"] else message
