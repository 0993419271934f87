"""AsyncOps: models of the rows that triggers/asyncops.sql publishes."""

from datetime import time
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from daemon.core.jobs import Job
from daemon.packs import SERIAL, Date, JsonObject, Pack, Row, Serial, Timestamp

Title = Annotated[str, Field(max_length=200)]
Severity = Literal["low", "medium", "high", "critical"]
IncidentStatus = Literal["open", "in_progress", "resolved", "closed"]
BlockerStatus = Literal["active", "resolved"]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]


class User(Row):
    """A member of the team. E-mail address and password hash are not published."""

    id: Serial
    full_name: Annotated[str, Field(max_length=255)]
    role: Literal["admin", "member"]
    is_active: bool
    created_at: Timestamp
    updated_at: Timestamp


class StatusUpdate(Row):
    """A status update for the team, in markdown."""

    id: Serial
    user_id: Serial
    title: Title
    content: Annotated[str, Field(max_length=10_000)]
    tags: list[str] | None
    created_at: Timestamp
    updated_at: Timestamp


class Incident(Row):
    """An incident. `reported_by_id` is null once that account is deleted."""

    id: Serial
    reported_by_id: Serial | None
    assigned_to_id: Serial | None
    title: Title
    description: Annotated[str, Field(max_length=5_000)]
    severity: Severity
    status: IncidentStatus
    resolution_notes: str | None
    created_at: Timestamp
    updated_at: Timestamp
    resolved_at: Timestamp | None


class Blocker(Row):
    """A blocker. `reported_by_id` is null once that account is deleted."""

    id: Serial
    reported_by_id: Serial | None
    description: Annotated[str, Field(max_length=2_000)]
    impact: Annotated[str, Field(max_length=1_000)]
    status: BlockerStatus
    resolution_notes: str | None
    related_status_id: Serial | None
    related_incident_id: Serial | None
    created_at: Timestamp
    updated_at: Timestamp
    resolved_at: Timestamp | None


class Decision(Row):
    """A decision of the team, and its reasons. `created_by_id` is null once that account is deleted."""

    id: Serial
    created_by_id: Serial | None
    title: Title
    description: Annotated[str, Field(max_length=5_000)]
    context: Annotated[str, Field(max_length=5_000)]
    outcome: Annotated[str, Field(max_length=5_000)]
    decision_date: Date
    tags: list[str] | None
    created_at: Timestamp
    updated_at: Timestamp


class DecisionParticipant(Row):
    """A user's part in a decision."""

    id: Serial
    decision_id: Serial
    user_id: Serial
    created_at: Timestamp


class DecisionAuditEntry(Row):
    """A change of a decision, or of one field of it. `changed_by_id` is null once that account is deleted."""

    id: Serial
    decision_id: Serial
    changed_by_id: Serial | None
    change_type: Literal["created", "updated", "deleted"]
    field_name: Annotated[str, Field(max_length=100)] | None
    old_value: str | None
    new_value: str | None
    changed_at: Timestamp


class Part(BaseModel):
    """The base of the models within a summary's content, as strict as a row model."""

    model_config = Row.model_config


class SummarizedStatusUpdate(Part):
    """A status update of the day; its time is in UTC, in whole seconds."""

    id: Serial
    title: Title
    author: Annotated[str, Field(max_length=255)]
    created_at: Annotated[
        str,
        Field(
            pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$",
            json_schema_extra={"format": "date-time"},
        ),
    ]


class SummarizedIncident(Part):
    """An incident that was active at the end of the day."""

    id: Serial
    title: Title
    severity: Severity
    status: IncidentStatus


class SummarizedBlocker(Part):
    """A blocker that was active at the end of the day."""

    id: Serial
    description: Annotated[str, Field(max_length=2_000)]
    status: BlockerStatus


class SummarizedDecision(Part):
    """A decision of the seven days up to the summary."""

    id: Serial
    title: Title
    decision_date: Date


class Statistics(Part):
    """The counts of a summary."""

    total_status_updates: Count
    critical_incidents: Count
    active_blockers: Count
    decisions_last_7_days: Count


class SummaryContent(Part):
    """The content of a summary as generate_daily_summary() writes it. The table accepts more."""

    status_updates: list[SummarizedStatusUpdate]
    incidents: list[SummarizedIncident]
    blockers: list[SummarizedBlocker]
    recent_decisions: list[SummarizedDecision]
    statistics: Statistics


class DailySummary(Row):
    """The summary of a day: its updates, and what was active at its end. See SummaryContent."""

    id: Serial
    summary_date: Date
    content: JsonObject
    status_updates_count: Count
    incidents_count: Count
    blockers_count: Count
    decisions_count: Count
    generated_at: Timestamp
    created_at: Timestamp


PACK = Pack(
    name="asyncops",
    tables={
        "users": User,
        "status_updates": StatusUpdate,
        "incidents": Incident,
        "blockers": Blocker,
        "decisions": Decision,
        "decision_participants": DecisionParticipant,
        "decision_audit_log": DecisionAuditEntry,
        "daily_summaries": DailySummary,
    },
    topics=(
        "team:members",
        "team:status_updates",
        "team:incidents",
        "team:blockers",
        "team:decisions",
        "team:summaries",
        rf"user:{SERIAL}",
    ),
    jobs=(
        Job(
            name="asyncops_summary",
            at=time(0, 10),
            meaning="the summary of the day before; made up for over the last 31 days",
            statement="summary",
            catch_up=31,
        ),
        Job(
            name="asyncops_archive",
            at=time(0, 20),
            meaning="archives status updates, incidents and blockers that are old enough",
            statement="archive",
        ),
    ),
)
