"""Makes the Grafana dashboards: `python deploy/observability/make_dashboards.py` writes dashboards/*.json.

Few panels, each the answer to one question; its description tells what to look for. A test holds the files to this one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
HEIGHT = 8
RATE = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One question: what is asked of Prometheus, by legend, and how the answer is drawn."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    stacked: bool = False
    signed: bool = False


@dataclass(frozen=True)
class Dashboard:
    """Panels in rows; ``per_job`` adds the choice of a job."""

    uid: str
    title: str
    description: str
    rows: dict[str, list[Panel]]
    per_job: bool = False


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, of all processes together."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{where}[{RATE}]))"


def mean(histogram: str, by: str = "") -> str:
    """The mean of what a histogram observed."""
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def quantile(q: float, histogram: str, by: str = "") -> str:
    """A quantile of what a histogram observed."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', f'le, {by}' if by else 'le')})"


JOB = '{jest_job="$jest_job"}'


def of_job(metric: str, by: str = "") -> str:
    """Per second, of the chosen job."""
    return rate(metric, by, JOB)


SELECTION = Dashboard(
    uid="jest-selection",
    title="JEST: selection",
    description="For who trains: does selection work, what does it save, who waits for whom.",
    rows={
        "What it saves": [
            Panel(
                "Examples loaded and trained",
                "What trainers load, and what selection leaves to be trained on. The distance is the work saved; it is the "
                "policies' filter ratio. Both at zero: nothing is decided.",
                "ops",
                {
                    "loaded": rate("jest_selector_examples_loaded_total"),
                    "trained": rate("jest_selector_examples_selected_total"),
                },
            ),
            Panel(
                "Reference embeddings",
                "Embedded by the reference model, and saved because the cache had them. After the first epoch, and with "
                "several jobs over the same data, nearly all should be saved.",
                "ops",
                {
                    "embedded": rate("jest_selector_reference_inferences_total"),
                    "saved by the cache": rate("jest_selector_reference_cache_hits_total"),
                },
            ),
            Panel(
                "Cached share",
                "Share of reference embeddings that needed no inference, over ten minutes. A sudden fall: the cache was "
                "lost or is too small, or the data is new.",
                "percentunit",
                {"cached": "jest:reference_cache_hits:ratio10m"},
            ),
        ],
        "Does it choose well": [
            Panel(
                "Learnability: chosen over dropped",
                "How much more learnable the chosen rows are than the dropped ones, each by its own pair, in nats. Near "
                "zero: selection finds nothing that uniform batches would not have.",
                "none",
                {"mean gap (nats)": mean("jest_selector_learnability_gap")},
            ),
            Panel(
                "Effective candidates of a chunk",
                "Perplexity of the distributions that chunks are drawn from. Near 1 the sampler is greedy: lower the gain, "
                "or normalise by the mean. As large as the super-batch: the gain is too low to choose anything.",
                "none",
                {f"p{round(100 * q)}": quantile(q, "jest_selector_sampling_perplexity") for q in (0.9, 0.5, 0.1)},
            ),
            Panel(
                "Not chosen by the policy",
                "Decisions that a fallback made. Should be zero; where it is not, the reference embeddings came too late.",
                "ops",
                {"{{fallback}}": rate("jest_selector_decisions_total", "fallback", '{fallback!="none"}')},
            ),
        ],
        "Who waits for whom": [
            Panel(
                "Where trainers' time goes",
                "Shares of the ranks' time. load: the data loader is too slow, or the server takes no more. embed: the "
                "price of looking at the whole super-batch. select: waiting for the server. train: what it is all for.",
                "percentunit",
                {
                    "{{phase}}": f"{rate('jest_trainer_step_seconds_total', 'phase')} "
                    f"/ on () group_left () {rate('jest_trainer_step_seconds_total')}"
                },
                stacked=True,
            ),
            Panel(
                "What a decision waits for",
                "Mean time of each stage. wait_learner: the slowest rank. wait_reference: scorers or Triton are behind. "
                "queue: the selector computes other selections. compute: the selection itself. record: Redis.",
                "s",
                {"{{stage}}": mean("jest_selector_stage_duration_seconds", "stage")},
                stacked=True,
            ),
            Panel(
                "Decisions",
                "Super-batches decided, all jobs together.",
                "ops",
                {"decisions": rate("jest_selector_decisions_total")},
            ),
        ],
    },
)

OPERATIONS = Dashboard(
    uid="jest-operations",
    title="JEST: operations",
    description="For who runs the server: health, saturation and errors of each component.",
    rows={
        "Health": [
            Panel(
                "Processes that answer",
                "Targets that Prometheus reaches, by component. A step down is a process that died or is being replaced.",
                "short",
                {"{{job}}": 'sum by (job) (up{job=~"selector|scorer|control|triton"})'},
            ),
            Panel(
                "Scorers whose reference model works",
                "Scorers whose last probe, a real inference, worked. Zero: nothing is scored.",
                "short",
                {"ready": "sum(jest_scorer_reference_ready)"},
            ),
            Panel(
                "Dead-lettered",
                "Super-batches dead-lettered, by reason, over ten minutes. Their examples are lost to training unless they "
                "are queued again (control).",
                "short",
                {
                    "{{reason}}": "sum by (reason) (increase(jest_selector_dead_letters_total[10m]) "
                    "or increase(jest_scorer_dead_letters_total[10m]))"
                },
            ),
        ],
        "Saturation": [
            Panel(
                "Shards that wait or are scored",
                "A queue that only grows means too few scorers or too little of Triton.",
                "short",
                {"queued": "max(jest_queue_shards)", "in scorers' hands": "sum(jest_scorer_shards_in_hand)"},
            ),
            Panel(
                "Oldest shard",
                "Jobs' fallbacks begin at their reference_timeout, 30 s unless they say otherwise.",
                "s",
                {"age": "max(jest_queue_oldest_age_seconds)"},
            ),
            Panel(
                "Redis memory",
                "The queue's must stay below its limit: it does not evict. The cache's may be at its limit.",
                "bytes",
                {
                    "{{store}}": "max by (store) (jest_redis_memory_bytes)",
                    "{{store}} limit": "max by (store) (jest_redis_max_memory_bytes)",
                },
            ),
            Panel(
                "Held by selectors",
                "Learner outputs in memory or scratch files, for selections that are not decided. Grows where ranks wait "
                "for each other or for the reference.",
                "bytes",
                {"{{instance}}": "jest_selector_held_bytes"},
            ),
            Panel(
                "Selections under way",
                "Selections that wait for ranks, for embeddings or for their turn.",
                "short",
                {"{{instance}}": "jest_selector_pending_selections"},
            ),
            Panel(
                "Embedded by Triton",
                "Examples that scorers sent, by what became of the inference, repeated ones included.",
                "ops",
                {"{{outcome}}": rate("jest_scorer_inference_examples_total", "outcome")},
            ),
        ],
        "Latency": [
            Panel(
                "Calls of trainers (p95)",
                "Time to answer, by method. SelectSubBatch includes waiting for the other ranks.",
                "s",
                {"{{method}}": quantile(0.95, "jest_rpc_duration_seconds", "method")},
            ),
            Panel(
                "Scoring (p95)",
                "A shard from claim to completion, and one inference. If only the shard is slow, scorers wait for each "
                "other's embeddings or for Redis.",
                "s",
                {
                    "shard": quantile(0.95, "jest_scorer_shard_duration_seconds"),
                    "inference": quantile(0.95, "jest_scorer_inference_duration_seconds"),
                },
            ),
            Panel(
                "Control (p95)",
                "Time to answer of the REST service, by route.",
                "s",
                {"{{route}}": quantile(0.95, "jest_http_request_duration_seconds", "route")},
            ),
        ],
        "Errors": [
            Panel(
                "Refused calls",
                "By reason. QUEUE_FULL and RATE_LIMITED are limits at work; TOKEN_* are strangers; the others are mistakes "
                "of callers.",
                "ops",
                {"{{reason}} {{limit}}": rate("jest_rpc_refusals_total", "reason, limit")},
            ),
            Panel(
                "Shards",
                "By what became of them, and those taken over from scorers that went silent.",
                "ops",
                {
                    "{{outcome}}": rate("jest_scorer_shards_total", "outcome"),
                    "taken over": rate("jest_scorer_reclaimed_shards_total"),
                },
            ),
            Panel(
                "Triton's requests",
                "As Triton counts them, every model of the ensemble by itself. Failures: its log tells why.",
                "ops",
                {
                    "answered": rate("nv_inference_request_success"),
                    "failed": rate("nv_inference_request_failure"),
                },
            ),
        ],
    },
)

PER_JOB = Dashboard(
    uid="jest-job",
    title="JEST: one job",
    description="One job's selection. `_other` is all jobs together that have no series of their own (JEST_METRICS_JOBS).",
    per_job=True,
    rows={
        "Selection": [
            Panel(
                "Examples loaded and trained",
                "What the job's ranks load, and what is left to be trained on.",
                "ops",
                {
                    "loaded": of_job("jest_job_examples_loaded_total"),
                    "trained": of_job("jest_job_examples_selected_total"),
                },
            ),
            Panel(
                "Learnability of a row's own pair",
                "In nats, means over the last decision. Falls as the learner nears the reference. Where the two lines "
                "meet, uniform batches would do.",
                "none",
                {"{{rows}}": f"avg by (rows) (jest_job_learnability{JOB})"},
                signed=True,
            ),
            Panel(
                "Effective candidates of a chunk",
                "Mean over the chunks of the last decision. Near 1 the sampler is greedy.",
                "none",
                {"perplexity": f"avg(jest_job_sampling_perplexity{JOB})"},
            ),
        ],
        "Waiting": [
            Panel(
                "Where its ranks' time goes",
                "Shares of the ranks' time: waiting for data, looking at the super-batch, waiting for decisions, training.",
                "percentunit",
                {
                    "{{phase}}": f"{of_job('jest_job_trainer_seconds_total', 'phase')} "
                    f"/ on () group_left () {of_job('jest_job_trainer_seconds_total')}"
                },
                stacked=True,
            ),
            Panel(
                "What its decisions wait for",
                "Mean time of each stage.",
                "s",
                {
                    "{{stage}}": f"{of_job('jest_job_stage_seconds_total', 'stage')} "
                    f"/ on () group_left () {of_job('jest_job_decisions_total')}"
                },
                stacked=True,
            ),
            Panel(
                "Reference embeddings",
                "Embedded for this job, and saved because the cache had them.",
                "ops",
                {
                    "embedded": of_job("jest_job_reference_inferences_total"),
                    "saved by the cache": of_job("jest_job_reference_cache_hits_total"),
                },
            ),
        ],
        "Trouble": [
            Panel(
                "Decisions",
                "By the fallback that chose; `none` is the job's own policy.",
                "ops",
                {"{{fallback}}": of_job("jest_job_decisions_total", "fallback")},
            ),
            Panel(
                "Dead-lettered by the selector",
                "Super-batches without a decision, over ten minutes, by reason.",
                "short",
                {"{{reason}}": f"sum by (reason) (increase(jest_job_dead_letters_total{JOB}[10m]))"},
            ),
            Panel(
                "Ranks",
                "As many as the job was created with.",
                "short",
                {"ranks": f"max(jest_job_ranks{JOB})"},
            ),
        ],
    },
)
DASHBOARDS = (SELECTION, OPERATIONS, PER_JOB)


def rendered(dashboard: Dashboard) -> dict[str, Any]:
    """Returns the dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in dashboard.rows.items():
        panels.append(_row(len(panels) + 1, title, y))
        y += 1
        x = 0
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y = 0, y + HEIGHT
            panels.append(_panel(len(panels) + 1, panel, x, y))
            x += panel.width
        y += HEIGHT
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["jest"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables(per_job=dashboard.per_job)},
        "panels": panels,
    }


def _variables(*, per_job: bool) -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    job = {
        "name": "jest_job",
        "label": "Job",
        "type": "query",
        "datasource": DATASOURCE,
        "query": "label_values(jest_job_decisions_total, jest_job)",
        "refresh": 2,
        "sort": 1,
    }
    return [source, job] if per_job else [source]


def _row(number: int, title: str, y: int) -> dict[str, Any]:
    position = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    drawn: dict[str, Any] = {"lineWidth": 2, "fillOpacity": 40 if panel.stacked else 5, "showPoints": "never"}
    if panel.stacked:
        drawn["stacking"] = {"mode": "normal", "group": "A"}
    least = {} if panel.signed else {"min": 0}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": drawn} | least, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def files() -> dict[str, str]:
    """Returns the text of every file by its name."""
    return {f"{each.uid}.json": json.dumps(rendered(each), indent=2) + "\n" for each in DASHBOARDS}


def main() -> None:
    """Writes the files."""
    for name, text in files().items():
        (HERE / "dashboards" / name).write_text(text)


if __name__ == "__main__":
    main()
