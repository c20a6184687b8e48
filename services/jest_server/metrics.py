"""Every metric of every server process: one prefix, base units, and no label whose values a client can invent."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_CANDIDATES = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000)


class RpcMetrics:
    """What every gRPC server counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.duration = Histogram(
            "jest_rpc_duration_seconds",
            "Time from a call's start to its answer.",
            ["method", "code"],
            buckets=_SECONDS,
            registry=registry,
        )


class ControlMetrics:
    """What the REST service counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.duration = Histogram(
            "jest_http_request_duration_seconds",
            "Time from a request's start to its answer.",
            ["method", "route", "code"],
            buckets=_SECONDS,
            registry=registry,
        )


class EmbeddingFileMetrics:
    """What a process knows of the embeddings in files behind its cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.hits = Counter(
            "jest_embedding_file_hits", "Reference embeddings that were found in files.", registry=registry
        )
        self.problems = Counter(
            "jest_embedding_file_problems",
            "Files, manifests and rows that could not be used, by what was wrong.",
            ["kind"],
            registry=registry,
        )
        self.rows = Gauge("jest_embedding_file_rows", "Rows of the files that are listed.", registry=registry)


class SelectorMetrics:
    """What the selector knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rpc = RpcMetrics(registry)
        self.embedding_files = EmbeddingFileMetrics(registry)
        self.decisions = Counter(
            "jest_selector_decisions",
            "Decisions recorded, by the fallback that was used.",
            ["fallback"],
            registry=registry,
        )
        self.dead_letters = Counter(
            "jest_selector_dead_letters", "Super-batches set aside.", ["reason"], registry=registry
        )
        self.stage = Histogram(
            "jest_selector_stage_duration_seconds",
            "Time of each stage of a selection.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.examples_loaded = Counter(
            "jest_selector_examples_loaded", "Examples in decided super-batches.", registry=registry
        )
        self.examples_selected = Counter(
            "jest_selector_examples_selected", "Examples chosen for training.", registry=registry
        )
        self.cache_hits = Counter(
            "jest_selector_reference_cache_hits", "Reference embeddings that needed no inference.", registry=registry
        )
        self.inferences = Counter(
            "jest_selector_reference_inferences", "Reference embeddings that were computed.", registry=registry
        )
        self.perplexity = Histogram(
            "jest_selector_sampling_perplexity",
            "Effective number of candidates of each chunk's sampling distribution.",
            buckets=_CANDIDATES,
            registry=registry,
        )
        self.assemblies = Gauge(
            "jest_selector_assemblies", "Selections that wait for learner outputs or embeddings.", registry=registry
        )
        self.held_bytes = Gauge(
            "jest_selector_held_bytes", "Learner outputs held, in memory or in scratch files.", registry=registry
        )
        self.queue_depth = Gauge("jest_queue_shards", "Shards queued or being scored.", registry=registry)
        self.queue_age = Gauge(
            "jest_queue_oldest_age_seconds", "Age of the oldest shard queued or being scored.", registry=registry
        )


class ScorerMetrics:
    """What a scorer knows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rpc = RpcMetrics(registry)
        self.embedding_files = EmbeddingFileMetrics(registry)
        self.shards = Counter(
            "jest_scorer_shards", "Shards taken, by what became of them.", ["outcome"], registry=registry
        )
        self.shard_duration = Histogram(
            "jest_scorer_shard_duration_seconds",
            "Time from claim to completion of a shard.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.cache_hits = Counter(
            "jest_scorer_cache_hits", "Examples that were cached when their shard was taken.", registry=registry
        )
        self.inferred = Counter(
            "jest_scorer_inferred_examples", "Examples embedded by the reference model.", registry=registry
        )
        self.inference_duration = Histogram(
            "jest_scorer_inference_duration_seconds",
            "Time of one inference request to the reference model.",
            ["outcome"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inference_examples = Counter(
            "jest_scorer_inference_examples",
            "Examples in inference requests, repeated requests included.",
            ["outcome"],
            registry=registry,
        )
        self.reclaimed = Counter(
            "jest_scorer_reclaimed_shards", "Shards taken over from a scorer that went silent.", registry=registry
        )
        self.reference_ready = Gauge(
            "jest_scorer_reference_ready", "1 while a real inference of the reference model works.", registry=registry
        )
        self.in_hand = Gauge("jest_scorer_shards_in_hand", "Shards being scored.", registry=registry)


def expose(registry: CollectorRegistry, listen: str) -> int:
    """Serves the metrics over HTTP at ``host:port`` from a thread and returns the port."""
    host, _, port = listen.rpartition(":")
    server, _ = start_http_server(int(port), addr=host, registry=registry)
    return int(server.server_port)
