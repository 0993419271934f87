"""Which jobs there are for the configured packs, and which of them this daemon runs."""

from collections.abc import Iterable
from typing import ClassVar

from daemon.core.errors import OperatorFault
from daemon.core.jobs import Job
from daemon.packs import bundled_jobs
from daemon.settings import VARIABLES, BadSettings, Settings


class UnknownJob(OperatorFault):
    """The configured packs have no job "{job}": choose among {known}."""

    exit_code: ClassVar[int] = 64

    def __init__(self, job: str, known: Iterable[str]) -> None:
        self.job, self.known = job, ", ".join(known)


def available_jobs(settings: Settings) -> dict[str, Job]:
    """The jobs of the configured packs and those that belong to no pack, by name, in the order of the day."""
    jobs = [job for job in bundled_jobs().values() if not job.pack or job.pack in settings.packs]
    return {job.name: job for job in sorted(jobs, key=lambda job: job.at)}


def scheduled_jobs(settings: Settings) -> list[Job]:
    """The jobs that ROWCAST_JOBS names. Raises UnknownJob, BadSettings."""
    names = available_jobs(settings) if "all" in settings.jobs else settings.jobs
    return [find_job(settings, name) for name in names]


def find_job(settings: Settings, name: str) -> Job:
    """The job of this name. Raises UnknownJob, and BadSettings if a setting that it needs is missing."""
    known = available_jobs(settings)
    if name not in known:
        raise UnknownJob(name, known)
    job = known[name]
    if job.needs and getattr(settings, job.needs) is None:
        raise BadSettings(f"The job {name} needs a directory for its files: set {VARIABLES[job.needs]}.")
    return job
