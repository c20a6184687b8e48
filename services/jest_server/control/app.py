"""The ASGI application: which path asks for what, and what it is answered with. Decisions are the use cases'."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import models_json_schema

from jest_server import __version__
from jest_server.control import problems
from jest_server.control.guard import API
from jest_server.control.views import (
    EXAMPLE_SPEC,
    DeadLetterPage,
    DecisionPage,
    Health,
    JobPage,
    JobRequest,
    JobView,
    QueueView,
    ReferenceList,
    ReferenceView,
    Requeued,
    summary,
    unscoped_record,
)
from jest_server.domain import tenants
from jest_server.domain.dead_letters import DeadLetter
from jest_server.domain.decisions import Decision
from jest_server.domain.errors import JobUnknown, Stopping, SuperBatchUnknown
from jest_server.domain.jobs import Job, JobName
from jest_server.domain.storage import CacheStats
from jest_server.domain.super_batches import SuperBatchId, SuperBatchRef
from jest_server.use_cases.dead_letters import DeadLetters

if TYPE_CHECKING:
    from collections.abc import Callable

    from jest_server.domain.ports import DecisionLog, EmbeddingCache, JobStore, ShardQueue, StoreConnection, Stores
    from jest_server.use_cases.jobs import JobRegistry

LARGEST_PAGE: Final = 1000
LARGEST_DECISION_PAGE: Final = 100
"""Decisions are large, and read whole."""

Name = Annotated[JobName, Path(description="A job, as its owner calls it.", examples=["siglip-base-1"])]
SuperBatch = Annotated[SuperBatchId, Path(description="A super-batch of the job.", examples=["0-00000017"])]
Limit = Annotated[int, Query(ge=1, le=LARGEST_PAGE, description="The most items to return.")]
_AFTER = r"^[A-Za-z0-9._-]{0,128}$"
_BEFORE = r"^([0-9.]{1,32}:[A-Za-z0-9._:-]{1,128})?$"
_PROBLEM: Final = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_JOB: Final = TypeAdapter(JobRequest)


def _can_fail(*statuses: int) -> dict[int | str, dict[str, Any]]:
    reasons = {
        400: "Invalid value.",
        401: "No token that is valid here.",
        404: "There is none of this name.",
        409: "It conflicts with what is there.",
        413: "The body is too large.",
        429: "A limit is reached; `Retry-After` tells when to come back.",
        503: "A dependency is unavailable; `Retry-After` may tell when to come back.",
    }
    found: dict[int | str, dict[str, Any]] = {s: {"description": reasons[s], "content": _PROBLEM} for s in statuses}
    # "4XX" also keeps FastAPI from promising its own 422, which this application never answers.
    return found | {"4XX": {"description": "The request is wrong; `reason` tells how.", "content": _PROBLEM}}


_ALWAYS: Final = (400, 401, 413, 429, 503)


class ControlApp(FastAPI):
    """Describes problems and tokens in its OpenAPI, which FastAPI knows nothing of."""

    needs_token = False

    def openapi(self) -> dict[str, Any]:
        """Returns the description of the API."""
        if self.openapi_schema:
            return self.openapi_schema
        schema = super().openapi()
        models: list[Any] = [(problems.Problem, "serialization"), (JobRequest, "validation")]
        _, forms = models_json_schema(models, ref_template="#/components/schemas/{model}")
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {}).update(forms["$defs"])
        if self.needs_token:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["security"] = [{"token": []}] if path.startswith(f"{API}/") else []
        return schema


def create_app(
    stores: Stores,
    cache: EmbeddingCache,
    jobs: JobRegistry,
    *,
    needs_token: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> ControlApp:
    """Builds the application over stores that stay the caller's to close.

    Args:
        stores: of jobs, super-batches, shards and decisions.
        cache: of reference embeddings.
        jobs: the use case of jobs.
        needs_token: whether to describe that requests need one; that they have one is for ``Guard``.
        stopping: tells whether the process is about to end, so that load balancers go elsewhere.
    """
    app = ControlApp(
        title="JEST Server control",
        version=__version__,
        description="Jobs, reference models, queue, cache, dead letters and decisions of a JEST Server.",
        docs_url=None,
        redoc_url=None,
    )
    app.needs_token = needs_token
    app.include_router(_health(stores.connection, cache, stopping))
    app.include_router(_jobs(jobs))
    app.include_router(_decisions(stores.decisions, jobs))
    app.include_router(_letters(DeadLetters(stores.decisions, jobs)))
    app.include_router(_state(stores.jobs, stores.queue, cache))
    problems.install(app)
    return app


def _router(tag: str) -> APIRouter:
    # The prefix is part of each route's path, by which requests are counted.
    return APIRouter(prefix=API, tags=[tag], dependencies=[Depends(_no_other_parameters)])


def _ref(name: str, super_batch_id: str) -> SuperBatchRef:
    return SuperBatchRef(tenants.scoped(name), super_batch_id)


async def _no_other_parameters(request: Request) -> None:
    """Refuses query parameters that would be ignored: most are misspelt."""
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            expected = f"one of {', '.join(sorted(known))}" if known else "none"
            raise RequestValidationError(
                [{"loc": ("query", name), "msg": f"no such parameter, expected {expected}", "input": name}]
            )


def _health(connection: StoreConnection, cache: EmbeddingCache, stopping: Callable[[], bool]) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", operation_id="getHealth")
    async def health() -> Health:
        """Answers while the process lives."""
        return Health()

    @router.get("/readyz", operation_id="getReadiness", responses=_can_fail(503))
    async def readiness() -> Health:
        """Answers 200 while the stores answer and the process is not about to end."""
        if stopping():
            raise Stopping("this process is going away")
        await connection.ping()
        await cache.ping()
        return Health()

    return router


def _jobs(jobs: JobRegistry) -> APIRouter:
    router = _router("jobs")

    async def view(job: Job) -> JobView:
        reference, counters = await jobs.state(job)
        spec = job.spec.model_copy(update={"name": tenants.unscoped(job.spec.name)})
        return JobView(spec=spec, created_at_s=job.created_at_s, reference=reference, counters=counters)

    @router.get("/jobs", operation_id="listJobs", responses=_can_fail(*_ALWAYS))
    async def list_jobs(
        after: Annotated[str, Query(pattern=_AFTER, description="`next_after` of the page before.")] = "",
        limit: Limit = 100,
    ) -> JobPage:
        """Returns the caller's jobs in order of name."""
        found, next_after = await jobs.list(after=after, limit=limit)
        return JobPage(jobs=[await view(job) for job in found], next_after=next_after)

    @router.post(
        "/jobs",
        operation_id="createJob",
        status_code=201,
        responses=_can_fail(*_ALWAYS, 409) | {200: {"model": JobView, "description": "It was there already."}},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": "#/components/schemas/JobRequest"},
                        "examples": {"siglip": {"value": EXAMPLE_SPEC}},
                    }
                },
            }
        },
    )
    async def create_job(request: Request, response: Response) -> JobView:
        """Registers a job; the same spec again changes nothing and is answered 200."""
        try:
            spec = _JOB.validate_json(await request.body(), strict=True)
        except ValidationError as error:
            found = [{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)]
            raise RequestValidationError(found) from error
        job, _, created = await jobs.create(spec.scoped())
        response.status_code = 201 if created else 200
        return await view(job)

    @router.get("/jobs/{name}", operation_id="getJob", responses=_can_fail(*_ALWAYS, 404))
    async def get_job(name: Name) -> JobView:
        """Returns a job with its accounts: submitted == selected + dead_lettered + in_flight."""
        return await view(await jobs.get(tenants.scoped(name)))

    @router.delete("/jobs/{name}", operation_id="deleteJob", status_code=204, responses=_can_fail(*_ALWAYS, 404))
    async def delete_job(name: Name) -> None:
        """Forgets a job, what it has in flight, its dead letters and its decisions."""
        if not await jobs.delete(tenants.scoped(name)):
            raise JobUnknown(f"job {name!r} does not exist", {"job": name})

    return router


def _decisions(log: DecisionLog, jobs: JobRegistry) -> APIRouter:
    router = _router("decisions")

    @router.get("/jobs/{name}/decisions", operation_id="listDecisions", responses=_can_fail(*_ALWAYS, 404))
    async def list_decisions(
        name: Name,
        before: Annotated[str, Query(pattern=_BEFORE, description="`next_before` of the page before.")] = "",
        limit: Annotated[int, Query(ge=1, le=LARGEST_DECISION_PAGE, description="The most items to return.")] = 20,
    ) -> DecisionPage:
        """Returns the job's decisions, the newest first, without positions."""
        job = (await jobs.get(tenants.scoped(name))).spec.name
        found, following = await log.list_decisions(job, before=before, limit=limit)
        return DecisionPage(decisions=[summary(decision) for decision in found], next_before=following or None)

    @router.get(
        "/jobs/{name}/decisions/{super_batch_id}", operation_id="getDecision", responses=_can_fail(*_ALWAYS, 404)
    )
    async def get_decision(name: Name, super_batch_id: SuperBatch) -> Decision:
        """Returns one recorded decision: enough, with the inputs, to compute it again."""
        ref = _ref(name, super_batch_id)
        await jobs.get(ref.job)
        decision = await log.get_decision(ref)
        if decision is None:
            raise SuperBatchUnknown(f"job {ref.job!r} has no decision of super-batch {super_batch_id!r}", ref.metadata)
        return unscoped_record(decision)

    return router


def _letters(letters: DeadLetters) -> APIRouter:
    router = _router("dead letters")
    one = "/jobs/{name}/dead-letters/{super_batch_id}"

    @router.get("/jobs/{name}/dead-letters", operation_id="listDeadLetters", responses=_can_fail(*_ALWAYS, 404))
    async def list_dead_letters(name: Name, limit: Limit = 100) -> DeadLetterPage:
        """Returns a job's newest dead letters, newest first."""
        found = await letters.newest(tenants.scoped(name), limit=limit)
        return DeadLetterPage(dead_letters=[unscoped_record(letter) for letter in found])

    @router.get(one, operation_id="getDeadLetter", responses=_can_fail(*_ALWAYS, 404))
    async def get_dead_letter(name: Name, super_batch_id: SuperBatch) -> DeadLetter:
        """Returns why a super-batch was dead-lettered."""
        return unscoped_record(await letters.get(_ref(name, super_batch_id)))

    @router.delete(one, operation_id="dropDeadLetter", status_code=204, responses=_can_fail(*_ALWAYS, 404))
    async def drop_dead_letter(name: Name, super_batch_id: SuperBatch) -> None:
        """Forgets a dead letter. The accounts go on counting it; its id may be submitted anew."""
        await letters.drop(_ref(name, super_batch_id))

    @router.post(f"{one}/requeue", operation_id="requeueDeadLetter", responses=_can_fail(*_ALWAYS, 404, 409))
    async def requeue(name: Name, super_batch_id: SuperBatch) -> Requeued:
        """Puts a super-batch back in flight as it was submitted, for the reference model as it is served now.

        Features are not kept: its ranks submit again, are told what is missing, upload it, and get a decision.
        """
        deadline_s, reference = await letters.requeue(_ref(name, super_batch_id))
        version = None if reference is None else reference.version
        return Requeued(super_batch_id=super_batch_id, deadline_s=deadline_s, reference_version=version)

    return router


def _state(references: JobStore, queue: ShardQueue, cache: EmbeddingCache) -> APIRouter:
    router = _router("state")

    @router.get("/references", operation_id="listReferences", responses=_can_fail(*_ALWAYS))
    async def list_references() -> ReferenceList:
        """Returns every version of every reference model that scorers serve or served within a day."""
        found, views, taken = await references.list_references(), [], set()
        for known in found:  # newest first: the first that is served is the current one
            current = known.served and known.reference.name not in taken
            if current:
                taken.add(known.reference.name)
            views.append(ReferenceView(**known.model_dump(), current=current))
        return ReferenceList(references=views)

    @router.get("/queue", operation_id="getQueue", responses=_can_fail(*_ALWAYS))
    async def get_queue() -> QueueView:
        """Returns how much waits for scorers, for how long, and in which model queues."""
        states = [
            state.model_copy(
                update={
                    "waiting": {
                        tenants.unscoped(job): count
                        for job, count in state.waiting.items()
                        if job.startswith(tenants.prefix())
                    }
                }
            )
            for state in await queue.queue_states()
        ]
        return QueueView(
            shards=await queue.depth(),
            oldest_age_s=await queue.oldest_age_s(now_s=time.time()),
            queues=states,
        )

    @router.get("/cache", operation_id="getCache", responses=_can_fail(*_ALWAYS))
    async def get_cache() -> CacheStats:
        """Returns how full the cache of reference embeddings is, of all models and tenants together."""
        return await cache.stats()

    return router
