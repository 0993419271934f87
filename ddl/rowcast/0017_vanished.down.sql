drop table rowcast.capturing;
