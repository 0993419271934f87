alter table rowcast.capturing drop column version;
drop table rowcast.layouts;
