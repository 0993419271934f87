-- An address, a name and a URL look like one. New rows follow these rules; the next revision checks existing ones.
-- The characters in the lists are blanks, control characters, and others that nobody sees. An address or a URL has none
-- of them, and a name has something else.

alter table chatgenius.users
add constraint users_email_shaped check (email = '' or email ~ '^[^@]+@[^@]+$') not valid,
add constraint users_email_well_formed check (
    email !~ '[\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint users_username_visible check (
    username = '' or username ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint users_full_name_visible check (
    full_name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint users_avatar_url_well_formed check (
    avatar_url <> '' and avatar_url !~ '[\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table chatgenius.channels
add constraint channels_name_visible check (
    name = '' or name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table chatgenius.files
add constraint files_name_visible check (
    name = '' or name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid,
add constraint files_url_well_formed check (
    url !~ '[\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;
