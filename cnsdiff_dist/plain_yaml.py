"""YAML of plain values: the loader of configs and suites, without torch."""

from typing import Any

import yaml

from cnsdiff_dist.errors import UserError


class _NoAliasLoader(yaml.SafeLoader):
    """Refuses aliases: no config needs one, and a few can stand for gigabytes or for themselves."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*..); write out what it stands for")
        return super().compose_node(parent, index)


def read_yaml(text: str, where: str, aliases: bool = False) -> Any:
    """Parse YAML of plain values.

    Args:
        where: the file or word that an error line names.
        aliases: accept aliases, which only a trusted author may use.

    Raises:
        UserError: the text is not such YAML.
    """
    try:
        return yaml.load(text, yaml.SafeLoader if aliases else _NoAliasLoader)
    except RecursionError:
        raise UserError(f"{where}: not YAML: nested too deeply") from None
    # PyYAML lets the errors of its constructors pass: dates and numbers out of range, odd tags.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: not YAML: {error}") from None
