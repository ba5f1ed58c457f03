"""YAML of a profile into plain values: nothing is guessed and nothing is lost without a word.

PyYAML reads YAML 1.1, where 1e-3 is a text, 1:30 is 90, 010 is 8, a date is an object and the
second of two equal keys wins. Here numbers are those of YAML 1.2, dates are texts, and a key given
twice is an error. Every error names line and key.
"""

import re

import yaml

from neft_utils.base.strict import ConfigError

_INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float"))


def read_yaml(path):
    """The values of a YAML file; ConfigError of one line that names the file and the place."""
    try:
        return yaml.load(path.read_text("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not YAML: {error}: save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path.name} is nested too deeply for a profile") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, stream):
        super().__init__(stream)
        self.keys = []  # of the values around the one that is being read

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep=True)  # deep: so that self.keys is true
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            said = f"{node.value[:40]!r} is no {node.tag.rpartition(':')[2]} that can be read"
            if isinstance(node.value, str) and len(node.value) > 40:
                said = f"{node.value[:20]}… ({len(node.value)} characters) cannot be read"
            raise ConfigError(f"line {_line(node)}{self._key()}: {said}") from None

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise ConfigError(
                        f"line {_line(key)}: key {key.value!r} is given twice, first in line"
                        f" {lines[key.value]}: keep one"
                    )
                lines[key.value] = _line(key)
        self.flatten_mapping(node)
        found = {}
        for key, value in node.value:
            name = self.construct_object(key)
            if not isinstance(name, str | int | float | bool | None):
                raise ConfigError(f"line {_line(key)}: a key must be a name")
            self.keys.append(str(getattr(key, "value", name)))
            found[name] = self.construct_object(value)
            self.keys.pop()
        return found

    def _key(self):
        return f", {'.'.join(self.keys)}" if self.keys else ""


def _line(node):
    return node.start_mark.line + 1


def _int(loader, node):
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, {"0x": 16, "0o": 8}.get(text.lstrip("+-")[:2].lower(), 10))


_OLD = ("int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in pairs if tag.rpartition(":")[2] not in _OLD]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = list("+-0123456789.")
_Loader.add_implicit_resolver(
    _INT, re.compile(r"[-+]?(0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)\Z"), _NUMBER
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"([-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
    ),
    _NUMBER,
)
_Loader.add_constructor(_INT, _int)
