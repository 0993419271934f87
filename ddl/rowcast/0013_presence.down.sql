drop table rowcast.acks;
drop table rowcast.users_present;
drop table rowcast.people;
drop table rowcast.presence_leases;
