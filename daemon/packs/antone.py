"""Antone: models of the rows that triggers/antone.sql publishes, and of what an application writes.

Applications validate with `PostContent`, `ReplyContent`, `Author` and `Scores` before they write: these refuse what
the specification refuses. The row models apply the same rules to published rows.
"""

import re
from datetime import time
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from daemon.core.jobs import Job
from daemon.packs import UUID, Pack, Row, Timestamp, Uuid

Platform = Literal["TWITTER", "REDDIT", "THREADS"]
Mode = Literal["HELPFUL", "ENGAGEMENT", "HYBRID", "DISENGAGED"]

SIGNATURE: Final = "—Antone (Vita)"
"""Every reply contains it, so that readers do not mistake it for a person's."""

_CLAIM: Final = re.compile(r"cure|prevent|treat|clinically proven", re.IGNORECASE | re.ASCII)
"""As the specification has it, so it also matches within words, such as "secure"."""


def _signed(text: str) -> str:
    if SIGNATURE not in text:
        raise ValueError("a reply must include the signature")
    return text


def _free_of_claims(text: str) -> str:
    if _CLAIM.search(text):
        raise ValueError("a reply must make no medical claim")
    return text


Score = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PostText = Annotated[str, Field(min_length=1, max_length=5000)]
ReplyText = Annotated[
    str, Field(min_length=10, max_length=1000), AfterValidator(_signed), AfterValidator(_free_of_claims)
]
PlatformPostId = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[a-zA-Z0-9_-]+$")]
Handle = Annotated[str, StringConstraints(min_length=1, max_length=50, pattern=r"^[a-zA-Z0-9_]+$")]
UtmCode = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[a-z0-9_-]+$")]
Person = Annotated[str, Field(max_length=255)]
Variant = Annotated[str, Field(max_length=100)]


class _Input(BaseModel):
    """The base of what an application is about to write. Its errors do not show the input."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


class PostContent(_Input):
    """A post that was detected. Raises ValidationError if it is malformed or matches no keyword."""

    content: PostText
    platform: Platform
    platform_post_id: PlatformPostId
    author_handle: Handle
    keyword_matches: Annotated[list[str], Field(min_length=1, max_length=50)]


class ReplyContent(_Input):
    """A reply, ready to post. Raises ValidationError if it is not signed, or makes a medical claim."""

    content: ReplyText
    utm_code: UtmCode


class Author(_Input):
    """An author on a platform, with what the platform publishes about them."""

    platform: Platform
    platform_id: Annotated[str, Field(min_length=1, max_length=100)]
    handle: Handle
    display_name: Annotated[str, Field(max_length=255)] | None = None
    follower_count: Annotated[int, Field(ge=0, lt=2**31)] = 0
    is_verified: bool = False
    is_power_user: bool = False
    archetype_tags: list[str] = []
    relationship_score: Score = 0.5


class Scores(_Input):
    """The scores on which a decision rests."""

    sss_score: Score
    ars_score: Score
    evs_score: Score
    trs_score: Score
    composite_score: Score


class Operator(Row):
    """A person who operates Antone."""

    id: Uuid
    name: Annotated[str, Field(min_length=1, max_length=255)]
    created_at: Timestamp
    updated_at: Timestamp


class Post(Row):
    """A post on a platform, and the keywords that it matched."""

    id: Uuid
    platform: Platform
    platform_post_id: PlatformPostId
    author_id: Uuid
    content: PostText
    detected_at: Timestamp
    processed_at: Timestamp | None
    keyword_matches: Annotated[list[str], Field(max_length=50)]
    keyword_categories: list[str]
    spam_filtered: bool
    created_at: Timestamp
    updated_at: Timestamp


class Decision(Row):
    """A decision how to treat a post, and its grounds."""

    id: Uuid
    post_id: Uuid
    sss_score: Score
    ars_score: Score
    evs_score: Score
    trs_score: Score
    composite_score: Score
    mode: Mode
    archetype_id: Uuid | None
    safety_flags: list[str]
    competitor_detected: bool
    is_power_user: bool
    experiment_id: Uuid | None
    experiment_variant: Variant | None
    is_randomized_experiment: bool
    predicted_mode: Mode | None
    created_at: Timestamp


class Reply(Row):
    """A reply to a post, from the draft on. `platform_post_id` is the reply's own, set once it is posted."""

    id: Uuid
    decision_id: Uuid
    content: ReplyText
    archetype_id: Uuid
    platform: Platform
    platform_post_id: PlatformPostId | None
    utm_code: UtmCode
    help_count: Annotated[int, Field(ge=0)]
    approval_status: Literal["PENDING", "APPROVED", "REJECTED"]
    approved_by: Person | None
    approved_at: Timestamp | None
    posted_at: Timestamp | None
    reply_type: Literal["MANUAL", "AUTO"]
    created_at: Timestamp
    updated_at: Timestamp


class Escalation(Row):
    """A matter that a person must look at. The post, decision or reply may have been archived since."""

    id: Uuid
    post_id: Uuid | None
    decision_id: Uuid | None
    reply_id: Uuid | None
    reason_id: Uuid
    priority: Literal["LOW", "MEDIUM", "HIGH", "CRITICAL"]
    status: Literal["OPEN", "IN_PROGRESS", "RESOLVED", "DISMISSED"]
    assigned_to: Person | None
    resolved_by: Person | None
    created_at: Timestamp
    resolved_at: Timestamp | None


PACK = Pack(
    name="antone",
    tables={
        "operators": Operator,
        "posts": Post,
        "decisions": Decision,
        "replies": Reply,
        "escalations": Escalation,
    },
    topics=(
        "platform:TWITTER",
        "platform:REDDIT",
        "platform:THREADS",
        f"post:{UUID}",
        "escalations",
        f"operator:{UUID}",
    ),
    jobs=(
        Job(
            name="antone_archive",
            at=time(0, 30),
            meaning="moves rows that are older than the pack's policy to files in ROWCAST_ARCHIVE_DIR",
            command=("archive", "antone"),
            needs="archive_dir",
        ),
    ),
)
