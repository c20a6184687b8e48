"""Values that cannot be, and what helm has to name when it refuses them."""

from __future__ import annotations

from typing import Any

TRIAL: dict[str, Any] = {"security": {"allowInsecure": True}}

# name: (values, what the refusal must contain, in any letter case)
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelled value": (TRIAL | {"selector": {"replica": 2}}, ("selector", "replica")),
    "a misspelled section": (TRIAL | {"scorers": {}}, ("scorers",)),
    "a number that is text": (TRIAL | {"scorer": {"replicas": "many"}}, ("scorer", "replicas", "integer")),
    "no replica": (TRIAL | {"scorer": {"replicas": 0}}, ("scorer", "replicas", "1")),
    "an unknown mode": (TRIAL | {"tls": {"mode": "on"}}, ("tls", "mode", "certmanager")),
    "a mode without its secret": (TRIAL | {"tls": {"mode": "secret"}}, ("tls", "secretname")),
    "a mode without its issuer": (TRIAL | {"tls": {"mode": "certManager"}}, ("issuerref", "name")),
    "a setting that does not exist": (
        TRIAL | {"settings": {"JEST_LOG_LEVLE": "debug"}},
        ("settings", "JEST_LOG_LEVLE"),
    ),
    "a setting of another process": (
        TRIAL | {"control": {"settings": {"JEST_MICROBATCH": 8}}},
        ("control", "JEST_MICROBATCH"),
    ),
    "a setting that the chart owns": (TRIAL | {"settings": {"JEST_LISTEN": "x"}}, ("settings", "JEST_LISTEN")),
    "a collector without a port": (
        TRIAL | {"tracing": {"endpoint": "http://collector"}},
        ("tracing", "endpoint"),
    ),
    "a share of traces above one": (TRIAL | {"tracing": {"ratio": 5}}, ("tracing", "ratio", "1")),
    "a digest that is none": (
        TRIAL | {"scorer": {"image": {"digest": "latest"}}},
        ("scorer", "digest", "sha256"),
    ),
    "a size without a unit that exists": (TRIAL | {"triton": {"sharedMemorySize": "2GB"}}, ("sharedmemorysize",)),
    "a model volume without a claim": (
        TRIAL | {"triton": {"modelRepository": {"type": "persistentVolumeClaim"}}},
        ("modelrepository", "claimname"),
    ),
    "a model store without a URL": (
        TRIAL | {"triton": {"modelRepository": {"type": "objectStore"}}},
        ("modelrepository", "url"),
    ),
    "a Triton address without a port": (
        TRIAL | {"triton": {"enabled": False, "externalUrl": "triton.example"}},
        ("externalurl",),
    ),
    "no Triton at all": (TRIAL | {"triton": {"enabled": False}}, ("Scorers need a Triton",)),
    "two Tritons": (TRIAL | {"triton": {"externalUrl": "triton:8001"}}, ("set one of them",)),
    "plain text": ({}, ("plain text", "tls.mode", "security.allowInsecure")),
    "TLS for anybody": ({"tls": {"mode": "secret", "secretName": "x"}}, ("Anybody could call", "tokensSecret")),
    "an external Redis without an address": (
        TRIAL | {"redis": {"mode": "external"}},
        ("redis.external.queue", "urlSecret"),
    ),
    "a password inside a host": (
        TRIAL | {"redis": {"mode": "external", "external": {"queue": {"host": "jest:secret@redis"}}}},
        ("queue", "host"),
    ),
    "a Sentinel without a port": (
        TRIAL | {"redis": {"mode": "external", "external": {"queue": {"sentinel": {"nodes": ["sentinel"]}}}}},
        ("sentinel", "nodes"),
    ),
    "KEDA without Prometheus": (
        TRIAL | {"scorer": {"autoscaling": {"enabled": True, "kind": "keda"}}},
        ("keda.prometheusAddress",),
    ),
    "fewer pods at most than at least": (
        TRIAL | {"scorer": {"autoscaling": {"enabled": True, "minReplicas": 9, "maxReplicas": 2}}},
        ("minReplicas (9)", "maxReplicas (2)"),
    ),
    "an embedding Job without data": (TRIAL | {"embed": {"enabled": True}}, ("embed", "data")),
    "a preprocess that names no function": (
        TRIAL | {"embed": {"enabled": True, "data": "d", "output": "o", "preprocess": "module"}},
        ("embed", "preprocess"),
    ),
    "a policy that lets in everybody by an empty peer": (
        TRIAL | {"networkPolicy": {"trainers": [{}]}},
        ("networkpolicy", "trainers"),
    ),
}
