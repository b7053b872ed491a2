"""A YAML subset of mappings, lists and strings. The field decides how a string is converted, not YAML.

So 1.10 can be a name, 010 is not octal and 1:30 is not a base-60 number. Tags are refused because they can create
Python objects, and aliases because a few lines of them can expand to gigabytes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, ClassVar

import yaml

from dynmoe.errors import first_line

_DEEPEST = 16  # far more levels than the configuration has
_NULL = "tag:yaml.org,2002:null"
_KINDS = (_NULL, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(_NULL, re.compile(r"(~|null|Null|NULL|)\Z"))] for first in ("~", "n", "N", "")
    }
    yaml_constructors: ClassVar = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*_KINDS, None)}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not supported", problem_mark=event.start_mark)
        if self._depth == _DEEPEST:
            raise yaml.MarkedYAMLError(problem="the file is nested too deeply", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = yaml.constructor.BaseConstructor.construct_mapping(
            self, node, deep
        )  # SafeLoader's own supports merge keys
        if len(mapping) < len(node.value):
            ((key, _),) = Counter(self.construct_object(key) for key, _ in node.value).most_common(1)
            raise yaml.MarkedYAMLError(problem=f"{key!r} occurs twice", problem_mark=node.start_mark)
        return mapping


def parse_yaml(text: str) -> Any:
    """Parses YAML into dictionaries, lists, strings and None.

    Raises:
        ValueError: the text is not in this subset of YAML; the message says why and in which line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except (yaml.YAMLError, OverflowError) as error:  # OverflowError: an escape above the Unicode range
        raise ValueError(first_line(error)) from None
