import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from jest_server.domain import tenants
from jest_server.domain.jobs import JobName, JobSpec
from jest_server.domain.policies import PolicySpec
from jest_server.domain.tenants import TenantName

names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")


async def as_tenant(tenant, look):
    tenants.enter(tenant)
    return look()


async def test_a_tenant_is_entered_for_one_task_alone():
    assert await asyncio.create_task(as_tenant("vision", tenants.current)) == "vision"
    assert tenants.current() == ""


async def test_without_tenants_names_are_what_they_are():
    assert (tenants.scoped("job"), tenants.unscoped("job"), tenants.prefix()) == ("job", "job", "")
    assert tenants.unscoped_text("job 'a~b'") == "job 'a~b'"


@given(tenant=names, other=names, job=names, other_job=names)
def test_names_of_two_tenants_never_meet(tenant, other, job, other_job):
    async def both():
        one = await asyncio.create_task(as_tenant(tenant, lambda: tenants.scoped(job)))
        two = await asyncio.create_task(as_tenant(other, lambda: tenants.scoped(other_job)))
        back = await asyncio.create_task(as_tenant(tenant, lambda: tenants.unscoped(one)))
        return one, two, back

    one, two, back = asyncio.run(both())
    assert back == job
    assert (one == two) == ((tenant, job) == (other, other_job))
    assert JobSpec(name=one, policy=PolicySpec(filter_ratio="0.5")).name == one


@pytest.mark.parametrize("name", ["vision~job", "~job", "job~"])
def test_no_client_can_write_another_tenants_name(name):
    with pytest.raises(ValidationError):
        TypeAdapter(JobName).validate_python(name)
    with pytest.raises(ValidationError):
        TypeAdapter(TenantName).validate_python(name)


async def test_what_a_tenant_reads_has_its_own_names():
    words = await asyncio.create_task(
        as_tenant("vision", lambda: tenants.unscoped_text("job 'vision~a' is not 'speech~a'"))
    )
    assert words == "job 'a' is not 'speech~a'"
