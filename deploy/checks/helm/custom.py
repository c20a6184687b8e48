"""Schemas of the kinds that Kubernetes itself does not know, as their operators define them.

The definitions come out of packages whose models are made from the operators' own (versions: requirements.txt). A model
takes more than an API server would: here fields that nobody defined and nulls are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jsonschema
from cloudcoil.models.cert_manager.v1 import Certificate
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

if TYPE_CHECKING:
    from objects import Object

_MODELS = (Certificate, PrometheusRule, ScaledObject, ServiceMonitor)
_NULL = {"type": "null"}


def validate(item: Object) -> None:
    """Raises jsonschema.ValidationError for what the operator's definition of the kind does not admit."""
    jsonschema.validate(item, SCHEMAS[item["kind"]])


def _closed(schema: Any) -> Any:
    """The same schema without nulls and without room for fields it does not name."""
    if isinstance(schema, list):
        return [_closed(inner) for inner in schema if inner != _NULL]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(inner) for name, inner in schema.items()}
    if isinstance(closed.get("pattern"), str):
        closed["pattern"] = closed["pattern"].replace(
            "^(?i)", "(?i)^"
        )  # Go's flags may stand anywhere, Python's in front
    if closed.get("properties"):
        closed.setdefault("additionalProperties", False)
    return closed


def _schema(model: Any) -> dict[str, Any]:
    return _closed(model.model_json_schema(by_alias=True)) | {"required": ["apiVersion", "kind", "metadata", "spec"]}


SCHEMAS = {model.__name__: _schema(model) for model in _MODELS}
