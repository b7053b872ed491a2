"""YAML of mappings, lists and text alone: what a word means is for its field to say, not for YAML.

So 1.10 may be a name, 010 is no octal number and 1:30 no number to base 60. There are no tags, which name types of
Python, and no aliases, by which a few lines unfold to gigabytes.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, ClassVar

import yaml

from dynmoe.errors import first_line

_DEEPEST = 16  # far more than the configuration has
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
            raise yaml.MarkedYAMLError(problem="it is nested too deeply", problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = yaml.constructor.BaseConstructor.construct_mapping(self, node, deep)  # SafeLoader's merges mappings
        if len(mapping) < len(node.value):
            ((key, _),) = Counter(self.construct_object(key) for key, _ in node.value).most_common(1)
            raise yaml.MarkedYAMLError(problem=f"{key!r} is there twice", problem_mark=node.start_mark)
        return mapping


def parse_yaml(text: str) -> Any:
    """Dictionaries, lists, texts and None.

    Raises:
        ValueError: the text is not YAML, or more than that; says what and in which line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}") from None
    except (yaml.YAMLError, OverflowError) as error:  # the second: an escape beyond Unicode
        raise ValueError(first_line(error)) from None
