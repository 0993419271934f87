"""The Antone schema against its specification, in a real Postgres.

Every test runs in a transaction that is rolled back.
"""

import json
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from pydantic import BaseModel, ValidationError

from daemon.packs import bundled
from daemon.packs.antone import Author, PostContent, Reply, ReplyContent, Scores
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate, sql_files
from tests.packs.databases import Events, session, undone
from tests.support.cases import for_each
from tests.support.catalog import catalog, contents
from tests.support.folders import Folders, value
from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]

# Tables and columns as in the specification; columns that reference a lookup table end in _id here.
SPECIFIED = {
    "authors": "id platform platform_id handle display_name follower_count is_verified is_power_user power_tier_id"
    " archetype_tags relationship_score interaction_history first_seen_at last_seen_at created_at updated_at",
    "posts": "id platform platform_post_id author_id content detected_at processed_at keyword_matches"
    " keyword_categories spam_filtered raw_metrics error_count error_message created_at updated_at",
    "decisions": "id post_id sss_score ars_score evs_score trs_score composite_score mode archetype_id safety_flags"
    " signals_json temporal_context competitor_detected is_power_user experiment_id experiment_variant"
    " is_randomized_experiment predicted_mode created_at",
    "replies": "id decision_id content archetype_id platform platform_post_id utm_code help_count approval_status"
    " approved_by approved_at posted_at metrics_json deleted_at delete_reason reply_type created_at updated_at",
    "competitors": "id name category_id primary_mechanism price_point brand_keywords created_at updated_at",
    "competitive_mentions": "id post_id competitor_id sentiment satisfaction opportunity_score replied created_at",
    "community_champions": "id author_id tier_id engagement_count dm_sent_at dm_response sample_sent converted"
    " advocate_status created_at updated_at",
    "kpi_metrics": "id date platform metric_type_id metric_name value created_at",
    "escalations": "id post_id decision_id reply_id reason_id priority status assigned_to resolved_by"
    " resolution_notes created_at resolved_at",
    "audit_logs": "id entity_type entity_id action actor details_json created_at",
    "experiments": "id name description variant_a variant_b metric traffic_split status start_date end_date"
    " results_json winner created_at updated_at",
    "weight_adjustment_logs": "id date action reason valid_segments total_segments sample_sizes old_weights"
    " new_weights predicted_improvement created_at",
    "learning_events": "id date adjustment_type adjustment predicted_improvement baseline_performance"
    " actual_improvement accuracy evaluated_at created_at",
    "randomized_experiments": "id decision_id predicted_mode actual_mode predicted_outcome actual_outcome created_at",
    "segmented_weights": "id segment_type segment_key sss_weight ars_weight evs_weight trs_weight sample_size"
    " performance updated_at created_at",
    "archetypes": "id name description is_active",
    "power_tiers": "id name follower_threshold description",
    "competitor_categories": "id name description",
    "kpi_types": "id name description aggregation_type",
    "escalation_reasons": "id name description severity",
    "champion_tiers": "id name min_engagement benefits",
}
OUR_OWN = ("operators", "archived_files")
REFERENCE_TABLES = {
    "archetypes": [
        *("CHECKLIST", "MYTHBUST", "COACH", "STORYLET", "HUMOR_LIGHT"),
        *("CREDIBILITY_ANCHOR", "CONFIDENT_RECOMMENDER", "PROBLEM_SOLUTION_DIRECT"),
    ],
    "power_tiers": ["MICRO", "MACRO", "MEGA"],
    "competitor_categories": ["DIRECT", "INDIRECT", "SUBSTITUTE"],
    "kpi_types": ["ENGAGEMENT", "REACH", "CONVERSION", "QUALITY", "SAFETY"],
    "escalation_reasons": ["MEDICAL_CLAIM", "SAFETY_FLAG", "POWER_USER", "LOW_CONFIDENCE", "NEGATIVE_REACTION"],
    "champion_tiers": ["SUPPORTER", "ADVOCATE", "AMBASSADOR"],
}
ENUMS = {
    "platform": ["TWITTER", "REDDIT", "THREADS"],
    "operational_mode": ["HELPFUL", "ENGAGEMENT", "HYBRID", "DISENGAGED"],
    "approval_status": ["PENDING", "APPROVED", "REJECTED"],
    "reply_type": ["MANUAL", "AUTO"],
    "experiment_status": ["DRAFT", "RUNNING", "COMPLETED", "CANCELLED"],
    "escalation_priority": ["LOW", "MEDIUM", "HIGH", "CRITICAL"],
    "escalation_status": ["OPEN", "IN_PROGRESS", "RESOLVED", "DISMISSED"],
}

# The ON DELETE action of each foreign key; docs/packs/antone/README.md gives the reasons.
FOREIGN_KEYS = {
    ("authors", "power_tier_id"): ("power_tiers", "RESTRICT"),
    ("posts", "author_id"): ("authors", "CASCADE"),
    ("decisions", "post_id"): ("posts", "CASCADE"),
    ("decisions", "archetype_id"): ("archetypes", "RESTRICT"),
    ("decisions", "experiment_id"): ("experiments", "RESTRICT"),
    ("replies", "decision_id"): ("decisions", "RESTRICT"),
    ("replies", "archetype_id"): ("archetypes", "RESTRICT"),
    ("competitors", "category_id"): ("competitor_categories", "RESTRICT"),
    ("competitive_mentions", "post_id"): ("posts", "CASCADE"),
    ("competitive_mentions", "competitor_id"): ("competitors", "CASCADE"),
    ("community_champions", "author_id"): ("authors", "CASCADE"),
    ("community_champions", "tier_id"): ("champion_tiers", "RESTRICT"),
    ("kpi_metrics", "metric_type_id"): ("kpi_types", "RESTRICT"),
    ("escalations", "post_id"): ("posts", "SET NULL"),
    ("escalations", "decision_id"): ("decisions", "SET NULL"),
    ("escalations", "reply_id"): ("replies", "SET NULL"),
    ("escalations", "reason_id"): ("escalation_reasons", "RESTRICT"),
    ("randomized_experiments", "decision_id"): ("decisions", "CASCADE"),
}

INDEXES = {
    *("decisions_created_at_idx", "decisions_experiment_variant_idx", "decisions_is_randomized_experiment_idx"),
    *("decisions_mode_idx", "decisions_composite_score_idx"),
    *("replies_posted_at_idx", "replies_approval_status_idx", "replies_platform_posted_at_idx"),
    *("weight_adjustment_logs_date_idx", "authors_is_power_user_idx", "authors_platform_handle_idx"),
    *("posts_processed_at_idx", "posts_platform_detected_at_idx"),
    *("escalations_status_priority_idx", "escalations_created_at_idx", "replies_platform_post_id_idx"),
}
QUERIES: dict[str, tuple[str, list[Any]]] = {
    "author_by_platform_id": ("authors_platform_platform_id_key", ["REDDIT", "id-7"]),
    "author_by_handle": ("authors_platform_handle_idx", ["REDDIT", "handle_7"]),
    "power_users": ("authors_is_power_user_idx", []),
    "post_by_platform_id": ("posts_platform_platform_post_id_key", ["REDDIT", "post-7"]),
    "newest_posts_of_platform": ("posts_platform_detected_at_idx", ["REDDIT", 50]),
    "posts_to_process": ("posts_processed_at_idx", [50]),
    "newest_posts_of_author": ("posts_author_id_detected_at_idx", ["00000000-0000-0000-0000-000000000007", 50]),
    "decisions_of_post": ("decisions_post_id_idx", ["00000000-0000-0000-0000-000000000007"]),
    "newest_decisions": ("decisions_created_at_idx", [50]),
    "best_decisions": ("decisions_composite_score_idx", [50]),
    "decisions_of_mode": ("decisions_mode_idx", ["DISENGAGED"]),
    "decisions_of_variant": ("decisions_experiment_variant_idx", ["COACH"]),
    "randomized_decisions": ("decisions_is_randomized_experiment_idx", []),
    "replies_to_approve": ("replies_approval_status_idx", [50]),
    "newest_replies": ("replies_posted_at_idx", [datetime.now(UTC) - timedelta(hours=1)]),
    "newest_replies_of_platform": ("replies_platform_posted_at_idx", ["REDDIT", datetime.now(UTC), 50]),
    "reply_by_platform_post_id": ("replies_platform_post_id_idx", ["reply-7"]),
    "replies_of_decision": ("replies_decision_id_idx", ["00000000-0000-0000-0000-000000000007"]),
    "open_escalations": ("escalations_status_priority_idx", []),
    "newest_escalations": ("escalations_created_at_idx", [50]),
    "weight_adjustments_since": ("weight_adjustment_logs_date_idx", [datetime.now(UTC).date() - timedelta(days=2)]),
}


def some_id(table: str) -> str:
    """The id of this table's row in `world`."""
    return f"00000000-0000-4000-8000-{[*SPECIFIED, *OUR_OWN].index(table):012}"


NOW = datetime(2026, 1, 2, tzinfo=UTC)
EARLIER = NOW - timedelta(days=1)
NOBODY = "00000000-0000-4000-8000-999999999999"
WORDS = {
    table: f"{letter}0000000-0000-4000-8000-000000000001"
    for table, letter in zip(REFERENCE_TABLES, "abcdef", strict=True)
}
SIGNED = "Try to go to bed at the same hour. —Antone (Vita)"

# One row of each table, complete but for its defaults, that does not conflict with the row in `world`.
SAMPLES: Mapping[str, Mapping[str, object]] = {
    "operators": {"name": "sample"},
    "authors": {"platform": "REDDIT", "platform_id": "sample", "handle": "sample"},
    "posts": {
        "platform": "REDDIT",
        "platform_post_id": "sample",
        "author_id": some_id("authors"),
        "content": "sample",
    },
    "experiments": {"name": "sample", "variant_a": "A", "variant_b": "B", "metric": "thanks"},
    "decisions": {
        "post_id": some_id("posts"),
        **dict.fromkeys(("sss_score", "ars_score", "evs_score", "trs_score", "composite_score"), 0.5),
        "mode": "HELPFUL",
    },
    "replies": {
        "decision_id": some_id("decisions"),
        "content": SIGNED,
        "archetype_id": WORDS["archetypes"],
        "platform": "REDDIT",
        "utm_code": "sample",
    },
    "competitors": {"name": "sample", "category_id": WORDS["competitor_categories"]},
    "competitive_mentions": {
        "post_id": some_id("posts"),
        "competitor_id": some_id("competitors"),
        "sentiment": -0.5,
        "opportunity_score": 0.5,
    },
    "community_champions": {"author_id": some_id("authors"), "tier_id": WORDS["champion_tiers"]},
    "kpi_metrics": {
        "date": date(2026, 1, 1),
        "platform": "REDDIT",
        "metric_type_id": WORDS["kpi_types"],
        "metric_name": "sample",
        "value": 1.5,
    },
    "escalations": {"reason_id": WORDS["escalation_reasons"]},
    "audit_logs": {"entity_type": "reply", "entity_id": NOBODY, "action": "approve", "actor": "sample"},
    "weight_adjustment_logs": {"action": "adjust"},
    "learning_events": {
        "adjustment_type": "weights",
        "predicted_improvement": 0.1,
        "baseline_performance": 0.5,
    },
    "randomized_experiments": {
        "decision_id": some_id("decisions"),
        "predicted_mode": "HELPFUL",
        "actual_mode": "HYBRID",
    },
    "segmented_weights": {
        "segment_type": "platform",
        "segment_key": "sample",
        **dict.fromkeys(("sss_weight", "ars_weight", "evs_weight", "trs_weight"), 0.25),
    },
    "archived_files": {
        "name": "sample.json",
        "table_name": "posts",
        "period": "2026-01-01",
        "row_count": 1,
        "sha256": "0" * 64,
        "completed_at": NOW,
    },
    "archetypes": {"name": "SAMPLE", "description": "sample"},
    "power_tiers": {"name": "SAMPLE", "follower_threshold": 1, "description": "sample"},
    "competitor_categories": {"name": "SAMPLE", "description": "sample"},
    "kpi_types": {"name": "SAMPLE", "description": "sample", "aggregation_type": "SUM"},
    "escalation_reasons": {"name": "SAMPLE", "description": "sample", "severity": 1},
    "champion_tiers": {"name": "SAMPLE", "min_engagement": 1, "benefits": "sample"},
}

# How the row in `world` differs from the sample.
WORLD: Mapping[str, Mapping[str, object]] = {
    "authors": {"platform_id": "world", "handle": "world"},
    "posts": {"platform_post_id": "world"},
    "kpi_metrics": {"metric_name": "world"},
    "segmented_weights": {"segment_key": "world"},
    "archived_files": {"name": "world.json"},
    **{table: {"name": "WORLD"} for table in REFERENCE_TABLES},
}
LEAVES = ("community_champions",)  # `world` has none, since their parent can have only one: the test's

# For every check constraint, rows that violate it and no other.
NUL_IN_LIST: list[object] = ["a", None]
NOT_A_SCORE: list[float] = [-0.01, 1.01, float("nan"), float("inf"), float("-inf")]
NOT_FINITE: list[float] = [float("nan"), float("inf"), float("-inf")]
NOT_AN_OBJECT = ["[]", "null", "1", '"text"']
UNSEEN = [" ", "\t\n", "\u00a0", "\u200b\ufeff"]
NOT_A_WORD = ["", "lower", "TWO WORDS", "1ST", "MICRO\n"]


def each(column: str, values: list[Any]) -> list[dict[str, Any]]:
    return [{column: one} for one in values]


VIOLATIONS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{f"{table}_name_is_word": (table, each("name", NOT_A_WORD)) for table in REFERENCE_TABLES},
    "power_tiers_follower_threshold_not_negative": ("power_tiers", each("follower_threshold", [-1])),
    "kpi_types_aggregation_type_known": ("kpi_types", each("aggregation_type", ["", "sum", "MEDIAN"])),
    "escalation_reasons_severity_in_range": ("escalation_reasons", each("severity", [0, 6])),
    "champion_tiers_min_engagement_not_negative": ("champion_tiers", each("min_engagement", [-1])),
    "operators_name_not_empty": ("operators", each("name", [""])),
    "operators_name_visible": ("operators", each("name", UNSEEN)),
    "authors_platform_id_not_empty": ("authors", each("platform_id", [""])),
    "authors_platform_id_visible": ("authors", each("platform_id", UNSEEN)),
    "authors_handle_is_handle": ("authors", each("handle", ["", "two words", "a-b", "@a", "ä", "a\n"])),
    "authors_follower_count_not_negative": ("authors", each("follower_count", [-1])),
    "authors_archetype_tags_is_list": ("authors", each("archetype_tags", [NUL_IN_LIST, [["a", "b"], ["c", "d"]]])),
    "authors_relationship_score_is_score": ("authors", each("relationship_score", NOT_A_SCORE)),
    "authors_interaction_history_is_array": ("authors", each("interaction_history", ["{}", "null", "1"])),
    "authors_seen_in_order": ("authors", [{"first_seen_at": NOW, "last_seen_at": EARLIER}]),
    "posts_platform_post_id_is_id": ("posts", each("platform_post_id", ["", "a b", "a/b", "a\n"])),
    "posts_content_not_empty": ("posts", each("content", [""])),
    "posts_keyword_matches_is_list": ("posts", each("keyword_matches", [NUL_IN_LIST, [["a"], ["b"]]])),
    "posts_keyword_matches_not_too_many": ("posts", each("keyword_matches", [["a"] * 51])),
    "posts_keyword_categories_is_list": ("posts", each("keyword_categories", [NUL_IN_LIST, [["a"], ["b"]]])),
    "posts_raw_metrics_is_object": ("posts", each("raw_metrics", NOT_AN_OBJECT)),
    "posts_error_count_not_negative": ("posts", each("error_count", [-1])),
    "experiments_name_not_empty": ("experiments", each("name", [""])),
    "experiments_name_visible": ("experiments", each("name", UNSEEN)),
    "experiments_variants_differ": ("experiments", [*each("variant_a", ["", "B"]), *each("variant_b", ["", "A"])]),
    "experiments_metric_not_empty": ("experiments", each("metric", [""])),
    "experiments_traffic_split_is_score": ("experiments", each("traffic_split", NOT_A_SCORE)),
    "experiments_dates_in_order": ("experiments", [{"start_date": NOW, "end_date": EARLIER}]),
    "experiments_results_json_is_object": ("experiments", each("results_json", NOT_AN_OBJECT)),
    "experiments_winner_is_variant": ("experiments", each("winner", ["", "C", "a"])),
    **{
        f"decisions_{score}_is_score": ("decisions", each(score, NOT_A_SCORE))
        for score in ("sss_score", "ars_score", "evs_score", "trs_score", "composite_score")
    },
    "decisions_safety_flags_is_list": ("decisions", each("safety_flags", [NUL_IN_LIST, [["a"], ["b"]]])),
    "decisions_signals_json_is_object": ("decisions", each("signals_json", NOT_AN_OBJECT)),
    "decisions_temporal_context_is_object": ("decisions", each("temporal_context", NOT_AN_OBJECT)),
    "replies_content_is_signed": ("replies", each("content", ["Go to bed at nine.", "Sleep well. -Antone (Vita)"])),
    "replies_content_makes_no_claim": (
        "replies",
        each(
            "content",
            [
                f"{claim} {SIGNED}"
                for claim in ("It cures all.", "PREVENTS colds.", "A Treat.", "Clinically proven.", "Be secure.")
            ],
        ),
    ),
    "replies_platform_post_id_is_id": ("replies", each("platform_post_id", ["", "a b"])),
    "replies_utm_code_is_code": ("replies", each("utm_code", ["", "Upper", "a b", "a\n"])),
    "replies_help_count_not_negative": ("replies", each("help_count", [-1])),
    "replies_approved_by_somebody": (
        "replies",
        [
            {"approval_status": "APPROVED"},
            {"approval_status": "APPROVED", "approved_by": "Olga"},
            {"approval_status": "APPROVED", "approved_at": NOW},
            {"approved_by": "Olga"},
            {"approval_status": "REJECTED", "approved_by": "Olga", "approved_at": NOW},
        ],
    ),
    "replies_metrics_json_is_object": ("replies", each("metrics_json", NOT_AN_OBJECT)),
    "replies_deleted_for_a_reason": ("replies", each("delete_reason", ["", "spam"])),
    "competitors_name_not_empty": ("competitors", each("name", [""])),
    "competitors_name_visible": ("competitors", each("name", UNSEEN)),
    "competitors_brand_keywords_is_list": ("competitors", each("brand_keywords", [NUL_IN_LIST, [["a"], ["b"]]])),
    "competitive_mentions_sentiment_in_range": (
        "competitive_mentions",
        each("sentiment", [-1.01, 1.01, *NOT_FINITE]),
    ),
    "competitive_mentions_satisfaction_is_score": ("competitive_mentions", each("satisfaction", NOT_A_SCORE)),
    "competitive_mentions_opportunity_score_is_score": (
        "competitive_mentions",
        each("opportunity_score", NOT_A_SCORE),
    ),
    "community_champions_engagement_count_not_negative": ("community_champions", each("engagement_count", [-1])),
    "community_champions_advocate_status_is_word": ("community_champions", each("advocate_status", NOT_A_WORD)),
    **{
        f"{table}_date_not_ahead": (table, each("date", [date(9999, 12, 30)]))
        for table in ("kpi_metrics", "weight_adjustment_logs", "learning_events")
    },
    "kpi_metrics_date_is_finite": ("kpi_metrics", each("date", [date.max, date.min])),
    "kpi_metrics_metric_name_not_empty": ("kpi_metrics", each("metric_name", [""])),
    "kpi_metrics_value_is_finite": ("kpi_metrics", each("value", NOT_FINITE)),
    "escalations_resolved_by_somebody": (
        "escalations",
        [
            {"status": "RESOLVED"},
            {"status": "DISMISSED", "resolved_at": NOW},
            {"status": "RESOLVED", "resolved_by": "Olga"},
            {"resolved_by": "Olga", "resolved_at": NOW},
            {"status": "IN_PROGRESS", "resolved_at": NOW},
        ],
    ),
    "audit_logs_entity_type_not_empty": ("audit_logs", each("entity_type", [""])),
    "audit_logs_action_not_empty": ("audit_logs", each("action", [""])),
    "audit_logs_actor_not_empty": ("audit_logs", each("actor", [""])),
    "audit_logs_details_json_is_object": ("audit_logs", each("details_json", NOT_AN_OBJECT)),
    "weight_adjustment_logs_action_not_empty": ("weight_adjustment_logs", each("action", [""])),
    "weight_adjustment_logs_segments_add_up": (
        "weight_adjustment_logs",
        [{"valid_segments": -1}, {"valid_segments": 2, "total_segments": 1}, {"total_segments": -1}],
    ),
    **{
        f"weight_adjustment_logs_{column}_is_object": ("weight_adjustment_logs", each(column, NOT_AN_OBJECT))
        for column in ("sample_sizes", "old_weights", "new_weights")
    },
    "weight_adjustment_logs_predicted_improvement_is_finite": (
        "weight_adjustment_logs",
        each("predicted_improvement", NOT_FINITE),
    ),
    "learning_events_adjustment_type_not_empty": ("learning_events", each("adjustment_type", [""])),
    "learning_events_adjustment_is_object": ("learning_events", each("adjustment", NOT_AN_OBJECT)),
    **{
        f"learning_events_{column}_is_finite": ("learning_events", each(column, NOT_FINITE))
        for column in ("predicted_improvement", "baseline_performance", "actual_improvement")
    },
    "learning_events_accuracy_is_score": ("learning_events", each("accuracy", NOT_A_SCORE)),
    **{
        f"randomized_experiments_{column}_is_finite": ("randomized_experiments", each(column, NOT_FINITE))
        for column in ("predicted_outcome", "actual_outcome")
    },
    "segmented_weights_segment_not_empty": (
        "segmented_weights",
        [*each("segment_type", [""]), *each("segment_key", [""])],
    ),
    **{
        f"segmented_weights_{column}_is_score": ("segmented_weights", each(column, NOT_A_SCORE))
        for column in ("sss_weight", "ars_weight", "evs_weight", "trs_weight")
    },
    "segmented_weights_sample_size_not_negative": ("segmented_weights", each("sample_size", [-1])),
    "segmented_weights_performance_is_finite": ("segmented_weights", each("performance", NOT_FINITE)),
    "archived_files_row_count_positive": ("archived_files", each("row_count", [0, -1])),
    "archived_files_sha256_is_hash": ("archived_files", each("sha256", ["", "0" * 63, "G" * 64])),
    "archived_files_complete_or_not": (
        "archived_files",
        [{"row_count": None}, {"sha256": None}, {"completed_at": None}, {"row_count": None, "sha256": None}],
    ),
}
# The signature alone has more than ten characters, so a reply that is too short violates that check as well.
TOO_SHORT = "replies_content_long_enough"

UNIQUE: dict[str, str] = {
    "authors_platform_platform_id_key": "authors",
    "posts_platform_platform_post_id_key": "posts",
    "kpi_metrics_date_platform_metric_type_id_metric_name_key": "kpi_metrics",
    "segmented_weights_segment_type_segment_key_key": "segmented_weights",
    "community_champions_author_id_key": "community_champions",
    **{f"{table}_name_key": table for table in REFERENCE_TABLES},
}


async def insert(db: Connection, table: str, /, **values: object) -> asyncpg.Record:
    """Insert the sample row of a table, with `values` in place of its own."""
    row = {**SAMPLES[table], **values}
    places = ", ".join(f"${n}" for n in range(1, len(row) + 1))
    statement = f"insert into antone.{table} ({', '.join(row)}) values ({places}) returning *"
    inserted = await db.fetchrow(statement, *row.values())
    assert inserted is not None
    return inserted


async def small_world(db: Connection) -> None:
    """One row of each table but LEAVES."""
    for table in SAMPLES:
        if table not in LEAVES:
            named = {} if table == "archived_files" else {"id": some_id(table)}
            await insert(db, table, **named, **WORLD.get(table, {}))


@pytest.fixture
async def world(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "antone-world", small_world) as connection:
        yield connection


async def count(db: Connection, table: str, where: str = "true", *values: object) -> int:
    return int(await db.fetchval(f"select count(*) from antone.{table} where {where}", *values))


async def constraints(db: Connection, kind: str) -> set[str]:
    found = await db.fetch(
        "select conname from pg_constraint where connamespace = 'antone'::regnamespace"
        " and contype = $1::text::\"char\" and conrelid <> 'antone.alembic_version'::regclass",
        kind,
    )
    return {row["conname"] for row in found}


# --- Structure -------------------------------------------------------------------------------------------------


async def test_the_schema_has_every_specified_table_and_few_others(db: Connection) -> None:
    tables = await db.fetch(
        "select tablename from pg_tables where schemaname = 'antone' and tablename <> 'alembic_version'"
    )
    assert {*SPECIFIED, *OUR_OWN} == {table["tablename"] for table in tables}
    assert 21 == len(SPECIFIED)


@for_each("table", SPECIFIED)
async def test_a_table_has_the_specified_columns_in_their_order(db: Connection, table: str) -> None:
    columns = await db.fetch(
        "select attname from pg_attribute where attrelid = $1::text::regclass and attnum > 0 and not attisdropped"
        " order by attnum",
        f"antone.{table}",
    )
    assert SPECIFIED[table].split() == [column["attname"] for column in columns]


async def test_static_enumerations_are_enum_types_with_their_values_in_order(db: Connection) -> None:
    types = await db.fetch(
        "select t.typname, array_agg(e.enumlabel::text order by e.enumsortorder) as words from pg_type t"
        " join pg_enum e on e.enumtypid = t.oid where t.typnamespace = 'antone'::regnamespace group by t.typname"
    )
    assert ENUMS == {row["typname"]: row["words"] for row in types}


async def test_a_value_outside_the_enum_type_is_refused(world: Connection) -> None:
    columns = await world.fetch(
        "select c.relname, a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid and c.relkind = 'r'"
        " join pg_type t on t.oid = a.atttypid where t.typnamespace = 'antone'::regnamespace and t.typtype = 'e'"
    )
    assert columns
    for table, column in columns:
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            async with world.transaction():
                await insert(world, table, **{column: "FACEBOOK"})


@for_each("table", REFERENCE_TABLES)
async def test_changing_enumerations_are_rows_that_a_revision_inserts(db: Connection, table: str) -> None:
    rows = await db.fetch(f"select name from antone.{table} order by id")
    assert REFERENCE_TABLES[table] == [row["name"] for row in rows]


async def test_a_new_archetype_needs_no_revision_and_can_be_retired(world: Connection) -> None:
    new = await insert(world, "archetypes", name="QUIET_LISTENER")
    assert new["is_active"]
    await insert(world, "decisions", archetype_id=new["id"])
    await world.execute("update antone.archetypes set is_active = false where id = $1", new["id"])
    assert 1 == await count(world, "decisions", "archetype_id = $1", new["id"])


async def test_ids_are_uuids_generated_by_the_database(world: Connection) -> None:
    bare = await world.fetch(
        "select table_name from information_schema.columns where table_schema = 'antone' and column_name = 'id'"
        " and table_name not like '%\\_to\\_archive'"
        " and (data_type, column_default) is distinct from ('uuid', 'gen_random_uuid()')"
    )
    assert [] == bare
    made = {str((await insert(world, "escalations"))["id"]) for _ in range(100)}
    assert 100 == len(made)


async def test_every_index_of_the_specification_exists_by_its_name(db: Connection) -> None:
    found = await db.fetch("select indexname from pg_indexes where schemaname = 'antone'")
    assert set() == INDEXES - {row["indexname"] for row in found}


async def test_every_foreign_key_is_covered_by_an_index(db: Connection) -> None:
    bare = await db.fetch(
        "select c.conname from pg_constraint c"
        " where c.connamespace = 'antone'::regnamespace and c.contype = 'f' and not exists ("
        "   select from pg_index i where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1]"
        "   and i.indisvalid and i.indpred is null)"
    )
    assert [] == [key["conname"] for key in bare]


async def test_no_index_is_a_prefix_of_another(db: Connection) -> None:
    repeated = await db.fetch(
        "select a.indexrelid::regclass::text as name from pg_index a join pg_index b"
        " on b.indrelid = a.indrelid and b.indexrelid <> a.indexrelid and not a.indisunique"
        " and (b.indkey::text || ' ') like (a.indkey::text || ' %')"
        " join pg_class c on c.oid = a.indrelid where c.relnamespace = 'antone'::regnamespace"
    )
    assert [] == [index["name"] for index in repeated]


def statements(pattern: str) -> list[sql_files.Statement]:
    return [
        statement
        for path in sorted((ROOT / "ddl/antone").glob(pattern))
        for statement in sql_files.read(path, pack="antone", schema="antone").statements
    ]


def test_no_revision_drops_a_column_adds_a_required_one_or_mixes_data_with_ddl() -> None:
    for path in sorted((ROOT / "ddl/antone").glob("*.up.sql")):
        words = [statement.words for statement in statements(path.name)]
        assert not any("drop" in statement and "column" in statement for statement in words), path
        required = [statement for statement in words if {"add", "column", "not", "null"} <= set(statement)]
        assert all("default" in statement for statement in required), path
        verbs = {statement[0] for statement in words}
        assert "insert" not in verbs or {"insert"} == verbs, path


# --- Integrity -------------------------------------------------------------------------------------------------


async def test_every_constraint_is_tested(db: Connection) -> None:
    assert {*VIOLATIONS, TOO_SHORT} == await constraints(db, "c")
    assert set(UNIQUE) == await constraints(db, "u")
    assert {f"{table}_pkey" for table in SAMPLES} == await constraints(db, "p")
    assert {f"{table}_{column}_fkey" for table, column in FOREIGN_KEYS} == await constraints(db, "f")


@for_each("table", SAMPLES)
async def test_a_row_needs_only_what_the_specification_requires(world: Connection, table: str) -> None:
    row = await insert(world, table)
    assert {name: str(given) for name, given in SAMPLES[table].items()} == {
        name: str(row[name]) for name in SAMPLES[table]
    }


@for_each("table", SAMPLES)
async def test_a_required_column_refuses_null(world: Connection, table: str) -> None:
    columns = await world.fetch(
        "select attname from pg_attribute where attrelid = $1::text::regclass and attnum > 0 and attnotnull"
        " and not attisdropped",
        f"antone.{table}",
    )
    assert columns
    for (column,) in columns:
        with pytest.raises(asyncpg.NotNullViolationError) as caught:
            async with world.transaction():
                await insert(world, table, **{column: None})
        assert (table, column) == (caught.value.table_name, caught.value.column_name)


@for_each("constraint", VIOLATIONS)
async def test_every_check_constraint_refuses_its_violations(world: Connection, constraint: str) -> None:
    table, rows = VIOLATIONS[constraint]
    for row in rows:
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with world.transaction():
                await insert(world, table, **row)
        assert constraint == caught.value.constraint_name, row


async def test_a_reply_that_is_too_short_is_refused_even_if_signed(world: Connection) -> None:
    await world.execute("alter table antone.replies drop constraint replies_content_is_signed")
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await insert(world, "replies", content="Sleep on.")
    assert TOO_SHORT == caught.value.constraint_name


@for_each(
    ("table", "values"),
    [
        ("authors", {"relationship_score": 0.0}),
        ("authors", {"relationship_score": 1.0, "archetype_tags": ["COACH"], "power_tier_id": WORDS["power_tiers"]}),
        ("posts", {"content": "x" * 5000, "keyword_matches": ["a"] * 50}),
        ("posts", {"content": "ä" * 5000, "keyword_matches": []}),
        ("replies", {"content": "x" * (1000 - len(SIGNED)) + SIGNED, "platform_post_id": "a-1_B"}),
        ("replies", {"approval_status": "APPROVED", "approved_by": "Olga", "approved_at": NOW}),
        ("replies", {"approval_status": "REJECTED", "deleted_at": NOW, "delete_reason": "spam"}),
        ("experiments", {"winner": "B", "start_date": EARLIER, "end_date": NOW, "status": "COMPLETED"}),
        ("escalations", {"status": "RESOLVED", "resolved_by": "Olga", "resolved_at": NOW}),
        ("competitive_mentions", {"sentiment": -1.0, "satisfaction": 1.0, "opportunity_score": 0.0}),
        ("kpi_metrics", {"value": -1e300}),
    ],
)
async def test_values_just_inside_the_limits_are_accepted(
    world: Connection, table: str, values: dict[str, object]
) -> None:
    row = await insert(world, table, **values)
    assert {name: str(given) for name, given in values.items()} == {name: str(row[name]) for name in values}


@for_each(
    ("table", "values"),
    [
        ("posts", {"content": "x" * 5001}),
        ("replies", {"content": SIGNED + "x" * 1000}),
        ("authors", {"handle": "a" * 51}),
    ],
)
async def test_values_that_are_too_long_are_refused(world: Connection, table: str, values: dict[str, object]) -> None:
    with pytest.raises(asyncpg.StringDataRightTruncationError):
        await insert(world, table, **values)


@for_each("constraint", UNIQUE)
async def test_a_duplicate_of_a_unique_value_is_refused(world: Connection, constraint: str) -> None:
    table = UNIQUE[constraint]
    await insert(world, table)
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(world, table)
    assert constraint == caught.value.constraint_name


@for_each("table", [table for table in SAMPLES if table != "archived_files"])
async def test_no_two_rows_have_the_same_id(world: Connection, table: str) -> None:
    first = await insert(world, table)
    other: dict[str, object] = {name: f"{value}2" for name, value in WORLD.get(table, {}).items()}
    if table == "community_champions":
        other["author_id"] = (await insert(world, "authors"))["id"]
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(world, table, id=first["id"], **other)
    assert f"{table}_pkey" == caught.value.constraint_name


async def test_no_two_archived_files_have_the_same_name(world: Connection) -> None:
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await insert(world, "archived_files", name="world.json")
    assert "archived_files_pkey" == caught.value.constraint_name


async def test_the_same_id_on_another_platform_is_another_author(world: Connection) -> None:
    await insert(world, "authors")
    await insert(world, "authors", platform="THREADS")
    assert 2 == await count(world, "authors", "platform_id = 'sample'")


@for_each(("table", "column"), FOREIGN_KEYS)
async def test_a_reference_to_a_missing_row_is_refused(world: Connection, table: str, column: str) -> None:
    with pytest.raises(asyncpg.ForeignKeyViolationError) as caught:
        await insert(world, table, **{column: NOBODY})
    assert f"{table}_{column}_fkey" == caught.value.constraint_name


async def test_author_post_and_reply_are_on_one_platform(world: Connection) -> None:
    for constraint, statement in {
        "posts_platform_of_author": "update antone.posts set platform = 'TWITTER'",
        "replies_platform_of_post": "update antone.replies set platform = 'TWITTER'",
        "authors_platform_of_posts": "update antone.authors set platform = 'TWITTER'",
    }.items():
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with world.transaction():
                await world.execute(statement)
        assert constraint == caught.value.constraint_name
    for table in ("posts", "replies"):
        with pytest.raises(asyncpg.CheckViolationError, match="is on the platform of its"):
            async with world.transaction():
                await insert(world, table, platform="THREADS")


async def test_a_post_with_replies_keeps_its_platform(world: Connection) -> None:
    elsewhere = (await insert(world, "authors", platform="THREADS"))["id"]
    with pytest.raises(asyncpg.CheckViolationError) as caught:
        await world.execute("update antone.posts set platform = 'THREADS', author_id = $1", elsewhere)
    assert "posts_platform_of_replies" == caught.value.constraint_name


async def test_a_post_without_replies_can_move_with_its_author(world: Connection) -> None:
    elsewhere = (await insert(world, "authors", platform="THREADS"))["id"]
    post = (await insert(world, "posts"))["id"]
    await world.execute("update antone.posts set platform = 'THREADS', author_id = $1 where id = $2", elsewhere, post)


async def test_a_decision_stays_with_its_post(world: Connection) -> None:
    post = (await insert(world, "posts"))["id"]
    with pytest.raises(asyncpg.RestrictViolationError, match="stays with its post"):
        await world.execute("update antone.decisions set post_id = $1", post)


async def test_an_escalation_is_about_one_post(world: Connection) -> None:
    post, decision, reply = (some_id(table) for table in ("posts", "decisions", "replies"))
    await insert(world, "escalations", post_id=post, decision_id=decision, reply_id=reply)
    other_post = (await insert(world, "posts"))["id"]
    other_decision = (await insert(world, "decisions"))["id"]
    for mixed in (
        {"post_id": other_post, "decision_id": decision},
        {"post_id": other_post, "reply_id": reply},
        {"decision_id": other_decision, "reply_id": reply},
    ):
        with pytest.raises(asyncpg.CheckViolationError) as caught:
            async with world.transaction():
                await insert(world, "escalations", **mixed)
        assert "escalations_about_one_post" == caught.value.constraint_name


async def test_rows_that_mixed_platforms_before_the_rule_are_counted_by_the_migration(empty_database: str) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    await migrate.rollback(empty_database, "antone", to="antone_0006", report=lambda _: None)
    async with session(empty_database) as db:
        await db.execute((ROOT / "ddl/antone/demo.sql").read_text())
        await db.execute("update antone.replies set platform = 'REDDIT' where platform = 'TWITTER'")
    with pytest.raises(DatabaseFault, match=r"3 replies are on another platform than their posts \(replies_platform"):
        await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    async with session(empty_database) as db:
        await db.execute(
            "update antone.replies as r set platform = p.platform from antone.decisions as d"
            " join antone.posts as p on p.id = d.post_id where d.id = r.decision_id and p.platform <> r.platform"
        )
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)


async def test_every_foreign_key_has_an_on_delete_action(db: Connection) -> None:
    keys = await db.fetch(
        "select conname, pg_get_constraintdef(oid) as definition from pg_constraint"
        " where connamespace = 'antone'::regnamespace and contype = 'f'"
    )
    assert {
        f"{table}_{column}_fkey": f"FOREIGN KEY ({column}) REFERENCES antone.{other}(id) ON DELETE {action}"
        for (table, column), (other, action) in FOREIGN_KEYS.items()
    } == {key["conname"]: key["definition"] for key in keys}


@for_each(("table", "column"), FOREIGN_KEYS)
async def test_a_deletion_applies_the_on_delete_action_to_each_child(
    world: Connection, table: str, column: str
) -> None:
    parent_table, action = FOREIGN_KEYS[table, column]
    parent = (await insert(world, parent_table))["id"]
    child = (await insert(world, table, **{column: parent}))["id"]
    delete = f"delete from antone.{parent_table} where id = $1"
    if action == "RESTRICT":
        with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
            async with world.transaction():
                await world.execute(delete, parent)
        # Postgres 18 reports RESTRICT as 23001, earlier versions as 23503.
        assert caught.value.sqlstate in ("23001", "23503")
        assert f"{table}_{column}_fkey" == caught.value.constraint_name
        assert 1 == await count(world, table, f"id = $1 and {column} = $2", child, parent)
        return
    await world.execute(delete, parent)
    assert 0 == await count(world, parent_table, "id = $1", parent)
    if action == "CASCADE":
        assert 0 == await count(world, table, "id = $1", child)
    else:
        assert 1 == await count(world, table, f"id = $1 and {column} is null", child)


async def test_deleting_an_author_deletes_posts_and_decisions_unless_one_was_answered(world: Connection) -> None:
    author = (await insert(world, "authors"))["id"]
    post = (await insert(world, "posts", author_id=author))["id"]
    decision = (await insert(world, "decisions", post_id=post))["id"]
    reply = (await insert(world, "replies", decision_id=decision))["id"]
    with pytest.raises(asyncpg.IntegrityConstraintViolationError) as caught:
        async with world.transaction():
            await world.execute("delete from antone.authors where id = $1", author)
    assert "replies_decision_id_fkey" == caught.value.constraint_name
    await world.execute("delete from antone.replies where id = $1", reply)
    await world.execute("delete from antone.authors where id = $1", author)
    assert (0, 0) == (
        await count(world, "posts", "id = $1", post),
        await count(world, "decisions", "id = $1", decision),
    )


async def test_rows_can_be_created_read_updated_and_deleted(world: Connection) -> None:
    author = (await insert(world, "authors", handle="crud"))["id"]
    assert "crud" == await world.fetchval("select handle from antone.authors where id = $1", author)
    await world.execute("update antone.authors set follower_count = 7 where id = $1", author)
    assert 7 == await world.fetchval("select follower_count from antone.authors where id = $1", author)
    assert "DELETE 1" == await world.execute("delete from antone.authors where id = $1", author)


TOUCHED = {
    "operators": ("name", "another"),
    "authors": ("follower_count", 3),
    "posts": ("error_count", 3),
    "experiments": ("description", "another"),
    "replies": ("help_count", 3),
    "competitors": ("price_point", "low"),
    "community_champions": ("engagement_count", 3),
    "segmented_weights": ("sample_size", 3),
}


async def test_every_table_with_updated_at_is_tested(db: Connection) -> None:
    found = await db.fetch(
        "select table_name from information_schema.columns"
        " where (table_schema, column_name) = ('antone', 'updated_at')"
    )
    assert set(TOUCHED) == {row["table_name"] for row in found}


@for_each("table", TOUCHED)
async def test_updated_at_follows_every_real_change_and_cannot_be_set(world: Connection, table: str) -> None:
    column, new = TOUCHED[table]
    row = await insert(world, table)
    update = f"update antone.{table} set {column} = $2, updated_at = '2001-01-01Z' where id = $1 returning updated_at"
    first = await world.fetchval(update, row["id"], new)
    assert row["updated_at"] < first
    nothing = f"update antone.{table} set {column} = {column} where id = $1 returning updated_at"
    assert first == await world.fetchval(nothing, row["id"])


# --- What applications check first -----------------------------------------------------------------------------

POST = {
    "content": "How do I sleep?",
    "platform": "REDDIT",
    "platform_post_id": "abc-1_2",
    "author_handle": "anna_1",
    "keyword_matches": ["sleep"],
}
REPLY = {"content": SIGNED, "utm_code": "spring-sleep_1"}
AUTHOR = {"platform": "THREADS", "platform_id": "12", "handle": "anna", "relationship_score": 1, "follower_count": 0}
SCORES = dict.fromkeys(("sss_score", "ars_score", "evs_score", "trs_score", "composite_score"), 0.5)
INPUTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (PostContent, POST),
    (ReplyContent, REPLY),
    (Author, AUTHOR),
    (Scores, SCORES),
]
REFUSED: list[tuple[type[BaseModel], dict[str, Any], str]] = [
    *[(PostContent, POST | {"content": bad}, "content") for bad in ("", "x" * 5001, None, 7)],
    *[(PostContent, POST | {"platform": bad}, "platform") for bad in ("FACEBOOK", "twitter", "")],
    *[(PostContent, POST | {"platform_post_id": bad}, "platform_post_id") for bad in ("", "x" * 101, "a b", "a\n")],
    *[(PostContent, POST | {"author_handle": bad}, "author_handle") for bad in ("", "x" * 51, "a-b", "a\n")],
    *[(PostContent, POST | {"keyword_matches": bad}, "keyword_matches") for bad in ([], ["a"] * 51, "sleep")],
    *[
        (ReplyContent, REPLY | {"content": bad}, "content")
        for bad in (
            *("Too short", "Go to bed at nine, every day.", SIGNED + "x" * 1000),
            *(f"{claim} {SIGNED}" for claim in ("It cures.", "PREVENTS it.", "Treatment.", "Clinically Proven.")),
        )
    ],
    *[(ReplyContent, REPLY | {"utm_code": bad}, "utm_code") for bad in ("", "Spring", "a b", "a\n")],
    *[(Author, AUTHOR | {"follower_count": bad}, "follower_count") for bad in (-1, 2**31, "1")],
    *[(Author, AUTHOR | {"relationship_score": bad}, "relationship_score") for bad in (-0.1, 1.1, float("nan"))],
    *[(Author, AUTHOR | {"handle": bad}, "handle") for bad in ("", "@anna", "x" * 51)],
    (Author, AUTHOR | {"platform_id": ""}, "platform_id"),
    *[(Scores, SCORES | {name: bad}, name) for name in SCORES for bad in (-0.01, 1.01, float("nan"), float("inf"))],
]


@pytest.mark.parametrize(("model", "given"), INPUTS, ids=lambda one: getattr(one, "__name__", ""))
def test_input_that_the_specification_accepts_is_accepted(model: type[BaseModel], given: dict[str, Any]) -> None:
    assert given == {name: getattr(model(**given), name) for name in given}
    assert given.keys() <= model.model_fields.keys()


@pytest.mark.parametrize(("model", "given", "field"), REFUSED, ids=lambda one: getattr(one, "__name__", None))
def test_input_that_the_specification_refuses_is_refused(
    model: type[BaseModel], given: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        model(**given)
    assert {field} == {error["loc"][0] for error in caught.value.errors()}


@pytest.mark.parametrize("model", [PostContent, ReplyContent, Author, Scores])
def test_an_input_refuses_unknown_and_missing_fields(model: type[BaseModel]) -> None:
    given = next(given for kind, given in INPUTS if kind is model)
    with pytest.raises(ValidationError):
        model(**given, unknown=1)
    with pytest.raises(ValidationError):
        model()


def test_a_validation_error_does_not_show_the_input() -> None:
    with pytest.raises(ValidationError) as caught:
        ReplyContent(content="It cures canary birds. —Antone (Vita)", utm_code="a")
    assert "canary" not in str(caught.value)


@for_each(
    "text", [text for model, given, _ in REFUSED if model is ReplyContent and (text := given["content"]) != SIGNED]
)
async def test_database_and_model_refuse_the_same_replies(world: Connection, text: str) -> None:
    with pytest.raises((asyncpg.CheckViolationError, asyncpg.StringDataRightTruncationError)):
        await insert(world, "replies", content=text)


@for_each("text", [f"{odd} {SIGNED}" for odd in ("cÜre", "cl\u0131nically proven", "tr.eat", "preveñt")])
async def test_database_and_model_accept_the_same_replies(world: Connection, text: str) -> None:
    assert text == ReplyContent(content=text, utm_code="a").content
    assert text == (await insert(world, "replies", content=text))["content"]


# --- Queries ---------------------------------------------------------------------------------------------------


def queries() -> dict[str, str]:
    text = (ROOT / "ddl/antone/queries.sql").read_text()
    return dict(block.split("\n", 1) for block in text.split("-- name: ")[1:])


async def fill(db: Connection) -> None:
    """Enough rows that the planner must choose: rare values are rare, and times are spread."""
    transaction = db.transaction()
    await transaction.start()
    await db.execute("set local session_replication_role = replica")  # no capture, no foreign key checks
    uuid = "('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid"
    platform = "case n % 400 when 7 then 'REDDIT' when 8 then 'THREADS' else 'TWITTER' end::antone.platform"
    for statement in (
        f"insert into antone.authors (id, platform, platform_id, handle, is_power_user)"
        f" select {uuid}, {platform}, 'id-' || n, 'handle_' || n, n % 100 = 0 from generate_series(1, 20000) as n",
        f"insert into antone.posts (id, platform, platform_post_id, author_id, content, detected_at, processed_at)"
        f" select {uuid}, {platform}, 'post-' || n, {uuid}, 'text', now() - n * interval '1 minute',"
        f" case when n > 100 then now() end from generate_series(1, 20000) as n",
        f"insert into antone.decisions (id, post_id, sss_score, ars_score, evs_score, trs_score, composite_score,"
        f" mode, experiment_variant, is_randomized_experiment, created_at) select {uuid}, {uuid}, 0.5, 0.5, 0.5, 0.5,"
        f" n / 20000.0, case when n % 100 = 0 then 'DISENGAGED' else 'HELPFUL' end::antone.operational_mode,"
        f" case when n % 100 = 1 then 'COACH' end, n % 100 = 2, now() - n * interval '1 minute'"
        f" from generate_series(1, 20000) as n",
        f"insert into antone.replies (id, decision_id, content, archetype_id, platform, platform_post_id, utm_code,"
        f" approval_status, approved_by, approved_at, posted_at) select {uuid}, {uuid}, '{SIGNED}',"
        f" '{WORDS['archetypes']}', {platform}, 'reply-' || n, 'a',"
        f" case when n <= 100 then 'PENDING' else 'APPROVED' end::antone.approval_status,"
        f" case when n > 100 then 'Olga' end, case when n > 100 then now() end, now() - n * interval '1 minute'"
        f" from generate_series(1, 20000) as n",
        f"insert into antone.escalations (id, reason_id, status, resolved_by, resolved_at, created_at)"
        f" select {uuid}, '{WORDS['escalation_reasons']}',"
        f" case when n <= 200 then 'OPEN' else 'RESOLVED' end::antone.escalation_status,"
        f" case when n > 200 then 'Olga' end, case when n > 200 then now() end, now() - n * interval '1 minute'"
        f" from generate_series(1, 20000) as n",
        "insert into antone.weight_adjustment_logs (date, action) select current_date - n, 'adjust'"
        " from generate_series(1, 5000) as n",
    ):
        await db.execute(statement)
    await transaction.commit()
    await db.execute(
        "analyze antone.authors, antone.posts, antone.decisions, antone.replies, antone.escalations,"
        " antone.weight_adjustment_logs"
    )


@pytest.fixture
async def large(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "antone-large", fill) as connection:
        yield connection


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    below: list[dict[str, Any]] = plan.get("Plans", [])
    return [plan, *(node for part in below for node in nodes(part))]


@for_each("name", QUERIES)
async def test_each_core_query_is_answered_by_its_index(large: Connection, name: str) -> None:
    index, arguments = QUERIES[name]
    text = await large.fetchval(f"explain (analyze, format json) {queries()[name]}", *arguments)
    plan = nodes(json.loads(text)[0]["Plan"])
    assert index in {node.get("Index Name") for node in plan}
    assert not [node for node in plan if node["Node Type"] == "Seq Scan"]
    assert plan[0]["Actual Rows"] >= 1


def test_every_core_query_has_an_index_and_every_specified_index_a_query() -> None:
    assert queries().keys() == QUERIES.keys()
    assert set() == INDEXES - {index for index, _ in QUERIES.values()}


# --- Capture and rights ----------------------------------------------------------------------------------------

POST_TOPIC = f"post:{some_id('posts')}"


@for_each("table", SAMPLES)
async def test_a_new_row_is_published_in_its_topics_or_in_none(world: Connection, table: str) -> None:
    events = await Events.from_now(world)
    row = await insert(world, table)
    expected = {
        "operators": lambda: {f"operator:{row['id']}"},
        "posts": lambda: {"platform:REDDIT", f"post:{row['id']}"},
        "decisions": lambda: {"platform:REDDIT", POST_TOPIC},
        "replies": lambda: {"platform:REDDIT", POST_TOPIC},
        "escalations": lambda: {"escalations"},
    }.get(table, set[str])()
    assert {(table, topic, "insert") for topic in expected} == set(await events.seen())


async def test_followers_receive_the_deletion_of_a_posts_decisions(world: Connection) -> None:
    post = (await insert(world, "posts"))["id"]
    await insert(world, "decisions", post_id=post)
    events = await Events.from_now(world)
    await world.execute("delete from antone.posts where id = $1", post)
    assert [
        ("decisions", "platform:REDDIT", "delete"),
        ("decisions", f"post:{post}", "delete"),
        ("posts", "platform:REDDIT", "delete"),
        ("posts", f"post:{post}", "delete"),
    ] == await events.seen()


async def test_a_soft_deleted_reply_is_published_as_deleted_and_stays_in_the_table(world: Connection) -> None:
    events = await Events.from_now(world)
    reply = (await insert(world, "replies"))["id"]
    await world.execute("update antone.replies set deleted_at = now(), delete_reason = 'spam' where id = $1", reply)
    assert ["insert", "insert", "delete", "delete"] == [kind for _, _, kind in await events.seen()]
    assert 1 == await count(world, "replies", "id = $1", reply)


async def test_nothing_but_their_posts_is_published_about_people(world: Connection) -> None:
    published = {
        row["table_name"]: set(row["columns"])
        for row in await world.fetch("select table_name, columns from rowcast.watched where pack = 'antone'")
    }
    assert {"operators", "posts", "decisions", "replies", "escalations"} == set(published)
    assert not {"raw_metrics", "error_message", "error_count"} & published["posts"]
    assert not {"signals_json", "temporal_context"} & published["decisions"]
    assert not {"metrics_json", "delete_reason", "deleted_at"} & published["replies"]
    assert "resolution_notes" not in published["escalations"]


@for_each("score", [0, 1, 0.1, 1 / 3, 5e-324, 0.1 + 0.2])
async def test_a_score_reaches_clients_as_exactly_the_same_number(world: Connection, score: float) -> None:
    await insert(world, "decisions", sss_score=float(score))
    record = await world.fetchval(
        "select record::text from rowcast.events where kind = 'insert' order by id desc limit 1"
    )
    assert score == json.loads(record, parse_constant=pytest.fail)["sss_score"]


async def test_the_row_model_refuses_what_the_table_refuses(world: Connection) -> None:
    await insert(world, "replies")
    record = json.loads(await world.fetchval("select record::text from rowcast.events order by id desc limit 1"))
    Reply.model_validate_json(json.dumps(record))
    for broken in (
        {"content": "Go to bed at nine."},
        {"help_count": -1},
        {"platform": "FACEBOOK"},
        {"utm_code": "A"},
    ):
        with pytest.raises(ValidationError):
            Reply.model_validate_json(json.dumps(record | broken))


async def may_read(db: Connection, user: str | None, topic: str | None) -> object:
    return await db.fetchval("select antone.may_read($1, $2)", user, topic)


OPERATOR = some_id("operators")


@for_each(
    "topic",
    ["platform:TWITTER", "platform:REDDIT", "platform:THREADS", POST_TOPIC, "escalations", f"operator:{OPERATOR}"],
)
async def test_operators_may_read_every_feed_and_others_none(world: Connection, topic: str) -> None:
    assert bundled()["antone"].serves(topic)
    assert True is await may_read(world, OPERATOR, topic)
    for stranger in (NOBODY, some_id("authors"), OPERATOR.upper() + " ", "", "operator", None):
        assert False is await may_read(world, stranger, topic)


@for_each(
    "topic",
    [
        *("", "platform:", "platform:FACEBOOK", "platform:twitter", "platform:TWITTER\n", "post:", "post:1"),
        *(
            POST_TOPIC + "0",
            POST_TOPIC.upper(),
            "escalation",
            "escalations:1",
            f"operator:{NOBODY}",
            "operators",
            None,
        ),
    ],
)
async def test_nobody_may_read_an_unknown_topic(world: Connection, topic: str | None) -> None:
    assert False is await may_read(world, OPERATOR, topic)


async def test_an_operator_id_in_capitals_may_read_nothing(world: Connection) -> None:
    known = "abcdef00-0000-4000-8000-000000000001"
    await insert(world, "operators", id=known)
    assert True is await may_read(world, known, "escalations")
    assert False is await may_read(world, known.upper(), "escalations")


@for_each(
    "end",
    ["delete from antone.operators where id = $1", "update antone.operators set deleted_at = now() where id = $1"],
)
async def test_the_rights_of_an_operator_who_leaves_end_with_that_change(world: Connection, end: str) -> None:
    await world.execute(end, OPERATOR)
    assert False is await may_read(world, OPERATOR, "escalations")
    revoked = await world.fetchval("select revokes::text from rowcast.events order by id desc limit 1")
    assert {"user": OPERATOR} == json.loads(revoked)


async def test_a_hostile_search_path_changes_nothing_about_who_may_read(world: Connection) -> None:
    await world.execute(
        "create temporary table operators (id uuid, deleted_at timestamptz);"
        f"insert into operators values ('{NOBODY}', null);"
        "create schema trap; create function trap.yes(text, text) returns boolean language sql as 'select true';"
        "create operator trap.~ (leftarg = text, rightarg = text, function = trap.yes);"
        "set local search_path = pg_temp, trap, pg_catalog"
    )
    assert False is await may_read(world, NOBODY, "platform:TWITTER")
    assert False is await may_read(world, OPERATOR, "platform:FACEBOOK")


async def test_security_definer_functions_use_only_the_catalog_path_and_are_not_public(
    db: Connection,
) -> None:
    functions = await db.fetch(
        "select p.proname, p.prosecdef, p.proconfig, has_function_privilege('public', p.oid, 'execute') as open"
        " from pg_proc p where p.pronamespace = 'antone'::regnamespace"
    )
    checks = {f"check_{row}" for row in ("author", "post", "decision", "reply", "escalation")}
    assert {"may_read", "set_updated_at", "release_post_decisions", *checks} == {f["proname"] for f in functions}
    assert {("search_path=pg_catalog, pg_temp",)} == {tuple(f["proconfig"]) for f in functions}
    assert not any(f["open"] for f in functions)


# --- The application's role ------------------------------------------------------------------------------------


@pytest.fixture
async def app(world: Connection) -> Connection:
    await world.execute("set local role antone_app")
    return world


async def test_the_role_of_the_application_is_no_superuser_and_owns_nothing(world: Connection) -> None:
    role = await world.fetchrow("select * from pg_roles where rolname = 'antone_app'")
    assert role is not None
    assert not any(
        role[right] for right in ("rolsuper", "rolcreatedb", "rolcreaterole", "rolreplication", "rolbypassrls")
    )
    owned = "select count(*) from pg_class where relowner = 'antone_app'::regrole"
    assert 0 == await world.fetchval(owned)


async def test_the_application_can_work_with_rows_from_a_post_to_its_reply(app: Connection) -> None:
    author = (await insert(app, "authors"))["id"]
    post = (await insert(app, "posts", author_id=author))["id"]
    decision = (await insert(app, "decisions", post_id=post))["id"]
    reply = (await insert(app, "replies", decision_id=decision))["id"]
    await app.execute(
        "update antone.replies set approval_status = 'APPROVED', approved_by = 'Olga', approved_at = now()"
        " where id = $1",
        reply,
    )
    await insert(app, "audit_logs", entity_id=reply)
    lonely = (await insert(app, "posts", author_id=author, platform_post_id="lonely"))["id"]
    await insert(app, "decisions", post_id=lonely)
    assert "DELETE 1" == await app.execute("delete from antone.posts where id = $1", lonely)
    assert await count(app, "replies") == 2


@for_each(
    "statement",
    [
        "create table antone.mine ()",
        "alter table antone.posts add column mine text",
        "drop table antone.posts",
        "truncate antone.posts",
        "create index on antone.posts (content)",
        "create function antone.mine() returns int language sql as 'select 1'",
        "create type antone.mine as enum ('a')",
        "alter type antone.platform add value 'MASTODON'",
        "alter table antone.posts disable trigger all",
        "delete from antone.replies",
        "update antone.audit_logs set actor = 'nobody'",
        "delete from antone.audit_logs",
        "insert into antone.operators (name) values ('me')",
        "update antone.operators set deleted_at = null",
        "delete from antone.archived_files",
        "select * from antone.alembic_version",
        "update antone.alembic_version set version_num = 'x'",
        "select antone.may_read('a', 'b')",
        "select * from rowcast.events",
        "select rowcast.unwatch('antone.posts')",
        "create role mine",
        "alter role antone_app superuser",
        "set session authorization postgres",
        "copy antone.posts to program 'true'",
    ],
)
async def test_the_application_may_do_nothing_but_work_with_rows(app: Connection, statement: str) -> None:
    with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.InvalidParameterValueError)):
        await app.execute(statement)


async def test_a_login_of_the_application_has_its_own_password_and_only_the_roles_rights(
    empty_database: str,
) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    url = urlsplit(empty_database)
    own = url._replace(netloc="antone_app:sesame@").geturl()
    with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):  # the role has no login yet
        await asyncpg.connect(own)
    async with session(empty_database) as owner:
        await owner.execute("alter role antone_app login password 'sesame'")
        try:
            async with session(own) as application:
                assert "antone_app" == await application.fetchval("select session_user")
                author = await insert(application, "authors")
                assert 1 == await count(application, "authors", "id = $1", author["id"])
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await application.execute("drop table antone.authors")
        finally:
            await owner.execute("alter role antone_app nologin password null")


async def test_a_role_that_is_created_after_the_pack_gets_its_rights_at_the_next_apply(empty_database: str) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    right = "select has_table_privilege('antone_app', 'antone.posts', 'insert')"
    async with session(empty_database) as db:
        await db.execute("drop owned by antone_app")  # as if the role were new
        assert not await db.fetchval(right)
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    assert await value(empty_database, right)


async def test_without_the_right_to_create_roles_the_pack_is_applied_with_a_warning(
    postgres: Server, empty_database: str
) -> None:
    warnings: list[str] = []
    async with session(empty_database) as owner:
        role = f"owner_{await owner.fetchval('select current_database()')}"
        exists = await owner.fetchval("select exists (select from pg_roles where rolname = 'antone_app')")
        if exists:  # hide the role that other tests use while this one runs
            await owner.execute("alter role antone_app rename to antone_app_hidden")
        try:
            await owner.execute(f"create role {role} login")
            await owner.execute(
                f"grant create on database {await owner.fetchval('select current_database()')} to {role}"
            )
            await owner.execute(f"grant pg_read_all_settings to {role}")
            await owner.execute(f"set role {role}")
            await owner.execute("create schema antone")
            await owner.execute("create table antone.posts ()")
            with_role = sql_files.read(ROOT / "ddl/antone/0005_access.up.sql", pack="antone", schema="antone")
            owner.add_log_listener(lambda _, message: warnings.append(message.message))
            for statement in with_role.statements[-2:]:
                await owner.execute(statement.text)
        finally:
            await owner.execute("reset role")
            if exists:
                await owner.execute("alter role antone_app_hidden rename to antone_app")
            await owner.execute(f"drop owned by {role}; drop role {role}")
    assert 1 == len(warnings)
    assert "may not create the role antone_app" in warnings[0]


# --- Sample data -----------------------------------------------------------------------------------------------


async def test_the_sample_data_have_what_the_specification_lists(db: Connection) -> None:
    await db.execute((ROOT / "ddl/antone/demo.sql").read_text())
    authors = await db.fetch("select platform, count(*) from antone.authors group by platform")
    assert {"TWITTER": 5, "REDDIT": 5, "THREADS": 5} == {row["platform"]: row["count"] for row in authors}
    assert 30 == await count(db, "posts", "cardinality(keyword_matches) > 0")
    for table in SAMPLES:
        assert table == "archived_files" or await count(db, table), table
    users = await db.fetch((ROOT / "ddl/antone/demo_users.sql").read_text())
    assert ["Olga Operator", "Piet Proofreader"] == [user["name"] for user in users]
    for user in users:
        assert True is await may_read(db, user["id"], "platform:TWITTER")


# --- Migration -------------------------------------------------------------------------------------------------


async def antone_and_a_broken_revision(tmp_path: Path) -> Folders:
    """The real files, followed by a revision whose last statement fails."""
    folders = Folders(tmp_path)
    for name in ("ddl/rowcast", "ddl/antone"):
        target = tmp_path / name
        target.mkdir(exist_ok=True)
        for path in (ROOT / name).glob("*.*"):
            (target / path.name).write_bytes(path.read_bytes())
    for path in (tmp_path / "ddl/rowcast").glob("0001_part*"):
        path.unlink()
    for name in ("rowcast.sql", "rowcast.down.sql", "antone.sql", "antone.down.sql"):
        (tmp_path / "triggers" / name).write_bytes((ROOT / "triggers" / name).read_bytes())
    folders.revision(
        "antone",
        9,
        up="alter table antone.posts add column mood text;\nupdate antone.posts set mood = 'good';\n"
        "drop table antone.learning_events;\nalter table antone.posts alter column nowhere set not null;",
    )
    return folders


async def test_a_failed_migration_restores_schema_and_rows(empty_database: str, tmp_path: Path) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    async with session(empty_database) as db:
        await db.execute((ROOT / "ddl/antone/demo.sql").read_text())
    schemas = ("rowcast", "antone")
    before = await catalog(empty_database, schemas), await contents(empty_database, "antone")
    folders = await antone_and_a_broken_revision(tmp_path)
    with pytest.raises(DatabaseFault, match=r"in antone/0009_part\.up\.sql: column .nowhere."):
        await folders.apply(empty_database, "antone")
    assert before == (await catalog(empty_database, schemas), await contents(empty_database, "antone"))
    assert "antone_0008" == await value(empty_database, "select version_num from antone.alembic_version")


async def test_a_rollback_removes_the_pack_with_its_rows_and_grants(empty_database: str) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    async with session(empty_database) as db:
        await db.execute((ROOT / "ddl/antone/demo.sql").read_text())
    await migrate.rollback(empty_database, "antone", to="antone_0004", report=lambda _: None)
    assert not await value(empty_database, "select has_table_privilege('antone_app', 'antone.posts', 'select')")
    await migrate.rollback(empty_database, "antone", report=lambda _: None)
    assert await value(empty_database, "select to_regnamespace('antone') is null")


def test_each_revision_and_each_sql_file_begins_with_a_description() -> None:
    for path in (ROOT / "ddl/antone").glob("0*.py"):
        assert re.match(r'"""[A-Z].{20,}\."""\n', path.read_text()), path
        assert path.with_suffix(".up.sql").read_text().startswith("-- "), path
