"""YAML files, read by words, and by no more than a configuration can need: of bytes, depth, aliases.

YAML's own reader drops the first of two equal keys without a word, and nine short lines of aliases stand for a billion
values.
"""

import reprlib
from pathlib import Path
from typing import Any

import yaml

from caco_scale.errors import UserError, one_line

MOST_BYTES = 100_000  # a whole configuration is 4,000
MOST_ENTRIES = 200  # of a section; ``<<`` can multiply them

_excerpt = reprlib.Repr()
_excerpt.maxlevel, _excerpt.maxstring, _excerpt.maxother = 2, 80, 80
excerpt = _excerpt.repr  # of a value, however much it is


class Refused(ValueError):
    """Good YAML that is no configuration: a key given twice, or far too much."""


class Typed(yaml.SafeLoader):
    """Reads YAML as SafeLoader does, within limits; a key given twice is :class:`Refused`."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # no name: refused later
            line = key.start_mark.line + 1
            if key.value in lines:
                fix = "join the two" if isinstance(value, yaml.MappingNode) else "keep one of them"
                raise Refused(
                    f"{key.value[:80]} is given twice, in lines {lines[key.value]} and {line}: {fix}"
                )
            lines[key.value] = line
        return node

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        if len(node.value) > MOST_ENTRIES:
            line = node.start_mark.line + 1
            raise Refused(
                f"{len(node.value):,} entries in the section of line {line}, {MOST_ENTRIES} at most"
            )


class Words(Typed):
    """Reads YAML whose values stay the words that were typed."""


KEPT_MEANINGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")  # nothing, and ``<<: *anchor``
Words.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag in KEPT_MEANINGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, loader: type[Typed] = Words) -> Any:
    """What a YAML file holds, by the words of it, or by :class:`Typed` with their meanings.

    Raises:
        UserError: it cannot be read, is no YAML, or no file that a person would write.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise Refused(f"{size:,} bytes, {MOST_BYTES:,} at most: is it the right file?")
        return yaml.load(path.read_text(), loader)
    except Refused as error:
        raise UserError(f"{path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep: give sections with fields") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not a YAML file: {one_line(error)[:400]}") from None
