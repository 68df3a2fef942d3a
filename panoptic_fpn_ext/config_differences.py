"""What a config has otherwise than the defaults, and who says so: the command line, its file, that
file's ``_BASE_``."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from .config import add_panoptic_fpn_config

_ORIGIN = "__panoptic_fpn_ext_origin__"  # beside yacs' own attributes: copied and pickled, no key


@dataclass(frozen=True)
class Origin:
    """What a config was made from.

    Attributes:
        file: its name.
        bases: of the files that its ``_BASE_`` names.
        own: the keys that the file sets otherwise than its bases, and what they are in these.
        command_line: the keys of the command line, and what they are in the file.
    """

    file: str
    bases: tuple[str, ...]
    own: Mapping[str, Any]
    command_line: Mapping[str, Any]


@dataclass(frozen=True)
class Differences:
    """Keys under one heading.

    Attributes:
        title: the heading.
        before: what the third of a row is called.
        rows: key, value, and its value before.
    """

    title: str
    before: str
    rows: list[tuple[str, str, str]]


def note_origin(cfg: CfgNode, file: str, in_file: CfgNode, keys: Iterable[str]) -> None:
    """Let a config, and its copies, know what it was made from. No key of it changes.

    Args:
        cfg: the config of a run.
        file: the name of its file.
        in_file: the config without what the command line says.
        keys: those that the command line sets.
    """
    values, (bases, base) = flat(in_file), _base_of(file)
    if base is None:  # of another version, which Detectron2 converts
        return
    before = flat(base)
    own = {k: before.get(k, "") for k, value in values.items() if before.get(k) != value}
    cfg.__dict__[_ORIGIN] = Origin(file, bases, own, {k: values.get(k, "") for k in keys})


def origin_of(cfg: CfgNode) -> Origin | None:
    """What :func:`note_origin` has noted, if it has."""
    return cfg.__dict__.get(_ORIGIN)


def differences(cfg: CfgNode) -> list[tuple[str, str, str]]:
    """Keys of a config that differ from the defaults: key, value, default."""
    theirs = flat(_defaults())
    return [
        (key, str(value), str(theirs.get(key, "")))
        for key, value in flat(cfg).items()
        if key not in theirs or theirs[key] != value
    ]


def grouped_differences(cfg: CfgNode) -> list[Differences]:
    """The keys given on the command line, those that the file has beyond its ``_BASE_``, and the
    rest that differs from the defaults; where the origin is not known, all that does."""
    all_of_them, origin = differences(cfg), origin_of(cfg)
    if origin is None:
        groups = [Differences("differs from the defaults", "Default", all_of_them)]
    else:
        values = flat(cfg)

        def rows(before: Mapping[str, Any]) -> list[tuple[str, str, str]]:
            return [(k, str(values[k]), str(v)) for k, v in before.items() if k in values]

        own = {k: v for k, v in origin.own.items() if k not in origin.command_line}
        rest = [r for r in all_of_them if r[0] not in own and r[0] not in origin.command_line]
        title, before = f"in {origin.file}", "Default"
        if origin.bases:
            title, before = f"{title}, beyond {', '.join(origin.bases)}", "In its _BASE_"
        groups = [
            Differences("given on the command line", "In the file", rows(origin.command_line)),
            Differences(title, before, rows(own)),
            Differences("the rest that differs from the defaults", "Default", rest),
        ]
    return [group for group in groups if group.rows]


def flat(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by their keys in full: ``MODEL.WEIGHTS`` and the like."""
    result: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_panoptic_fpn_config(cfg)
    return cfg


def _base_of(file: str) -> tuple[tuple[str, ...], CfgNode | None]:
    """What ``_BASE_`` of a config file names, and the config without what the file itself says;
    None if that cannot be told."""
    with open(file, encoding="utf-8") as opened:
        named = (yaml.safe_load(opened) or {}).get("_BASE_", [])
    bases = tuple([named] if isinstance(named, str) else named)
    cfg = _defaults()
    for base in bases:
        path = os.path.expanduser(base)
        if "://" not in path:  # relative to the file
            path = os.path.join(os.path.dirname(file), path)
        try:
            cfg.merge_from_other_cfg(CfgNode(CfgNode.load_yaml_with_base(path)))
        except (KeyError, ValueError, AssertionError):
            return bases, None
    return bases, cfg
