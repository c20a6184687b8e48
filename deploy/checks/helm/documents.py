"""What is made from other files of the chart: README.md from values.yaml, the schema's names from settings.py.

`make documents` writes them; `make helm-test` fails if they are not as written.
"""

from __future__ import annotations

import ast
import io
import json
from typing import TYPE_CHECKING

import yaml
from common import ROOT
from tools import CHART

if TYPE_CHECKING:
    from collections.abc import Iterator

_SETTINGS = ROOT / "services/jest_server/runtime/settings.py"
_CLASSES = {"selector": "SelectorSettings", "scorer": "ScorerSettings", "control": "ControlSettings"}
# Where they come from other values of the chart, or must fit the container's ports.
_OWNED = {
    "allow_insecure", "cache_url", "consumer", "device", "drain_delay_s", "embeddings_url", "grace_s", "health_listen",
    "listen", "metrics_listen", "queue_url", "reference_model", "scratch_dir", "tls_certificate", "tls_client_ca",
    "tls_key", "tokens_file", "tracing", "triton_url",
}  # fmt: skip


def documents() -> dict[str, str]:
    """Returns what each made file has to hold, by its path in the chart."""
    return {"README.md": _readme(), "values.schema.json": _schema()}


def leaves(text: str) -> Iterator[tuple[str, str, str]]:
    """Yields path, default and sentence of each value in values.yaml.

    Raises:
        ValueError: If a value has no sentence.
    """
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, above: str) -> Iterator[tuple[str, str, str]]:
        for key, value in node.value:
            path = f"{above}{key.value}"
            sentence = _sentence_above(lines, key.start_mark.line)
            if sentence:
                yield path, _default(value), sentence
            elif isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, f"{path}.")
            else:
                raise ValueError(f"{path} in values.yaml has no sentence: write one above it, after '# -- '")

    yield from walk(yaml.compose(text), "")


def _sentence_above(lines: list[str], number: int) -> str:
    above = lines[number - 1].strip() if number else ""
    return above.removeprefix("# -- ") if above.startswith("# -- ") else ""


def _default(node: yaml.Node) -> str:
    value = yaml.safe_load(io.StringIO(yaml.serialize(node)))
    return json.dumps(value)


def _readme() -> str:
    head = (CHART / "README.head.md").read_text()
    rows = [
        f"| `{path}` | `{default}` | {sentence.replace('|', chr(92) + '|')} |"
        for path, default, sentence in leaves((CHART / "values.yaml").read_text())
    ]
    return "\n".join([head.rstrip("\n"), "", "## Values", "", "| value | default | |", "|---|---|---|", *rows, ""])


def _schema() -> str:
    path = CHART / "values.schema.json"
    schema = json.loads(path.read_text())
    names = setting_names()
    for process, known in {**names, "all": set().union(*names.values())}.items():
        schema["definitions"][f"{process}Settings"]["properties"] = {
            name: {"$ref": "#/definitions/scalar"} for name in sorted(known)
        }
    return json.dumps(schema, indent=2) + "\n"


def setting_names() -> dict[str, set[str]]:
    """Returns the variables that each process reads and the chart does not set itself."""
    classes = {node.name: node for node in ast.parse(_SETTINGS.read_text()).body if isinstance(node, ast.ClassDef)}

    def fields(name: str) -> set[str]:
        own = {item.target.id for item in classes[name].body if isinstance(item, ast.AnnAssign)}
        bases = (base.id for base in classes[name].bases if base.id in classes)
        return own.union(*(fields(base) for base in bases))

    return {
        process: {f"JEST_{field.upper()}" for field in fields(name) - _OWNED if field != "model_config"}
        for process, name in _CLASSES.items()
    }


if __name__ == "__main__":
    for name, content in documents().items():
        (CHART / name).write_text(content)
