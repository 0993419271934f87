drop table rowcast.jobs;
