-- Other rows of these tables stay until the tables are dropped.
delete from antone.champion_tiers as t where t.id::text like 'f0000000-0000-4000-8000-00000000000_';
delete from antone.escalation_reasons as r where r.id::text like 'e0000000-0000-4000-8000-00000000000_';
delete from antone.kpi_types as t where t.id::text like 'd0000000-0000-4000-8000-00000000000_';
delete from antone.competitor_categories as c where c.id::text like 'c0000000-0000-4000-8000-00000000000_';
delete from antone.power_tiers as t where t.id::text like 'b0000000-0000-4000-8000-00000000000_';
delete from antone.archetypes as a where a.id::text like 'a0000000-0000-4000-8000-00000000000_';
