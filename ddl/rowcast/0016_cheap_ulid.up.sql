-- The same ids for half: a function call costs a writer more than what it computes, and the digits were made one by one.
-- The digits of the time are looked up two at a time. Those that are random come from base64, which writes six bits as a
-- character where a ULID writes five: the sixth is always one, which leaves g-z, 0-9, + and /, and any order of them will do.
-- Every name and operator is qualified, as in rowcast_0005. Such operators have one precedence, from left to right.
create or replace function rowcast.ulid() returns text
language plpgsql volatile parallel safe
as $$
declare
    pairs constant pg_catalog.bytea :=
        '000102030405060708090A0B0C0D0E0F0G0H0J0K0M0N0P0Q0R0S0T0V0W0X0Y0Z'
        '101112131415161718191A1B1C1D1E1F1G1H1J1K1M1N1P1Q1R1S1T1V1W1X1Y1Z'
        '202122232425262728292A2B2C2D2E2F2G2H2J2K2M2N2P2Q2R2S2T2V2W2X2Y2Z'
        '303132333435363738393A3B3C3D3E3F3G3H3J3K3M3N3P3Q3R3S3T3V3W3X3Y3Z'
        '404142434445464748494A4B4C4D4E4F4G4H4J4K4M4N4P4Q4R4S4T4V4W4X4Y4Z'
        '505152535455565758595A5B5C5D5E5F5G5H5J5K5M5N5P5Q5R5S5T5V5W5X5Y5Z'
        '606162636465666768696A6B6C6D6E6F6G6H6J6K6M6N6P6Q6R6S6T6V6W6X6Y6Z'
        '707172737475767778797A7B7C7D7E7F7G7H7J7K7M7N7P7Q7R7S7T7V7W7X7Y7Z'
        '808182838485868788898A8B8C8D8E8F8G8H8J8K8M8N8P8Q8R8S8T8V8W8X8Y8Z'
        '909192939495969798999A9B9C9D9E9F9G9H9J9K9M9N9P9Q9R9S9T9V9W9X9Y9Z'
        'A0A1A2A3A4A5A6A7A8A9AAABACADAEAFAGAHAJAKAMANAPAQARASATAVAWAXAYAZ'
        'B0B1B2B3B4B5B6B7B8B9BABBBCBDBEBFBGBHBJBKBMBNBPBQBRBSBTBVBWBXBYBZ'
        'C0C1C2C3C4C5C6C7C8C9CACBCCCDCECFCGCHCJCKCMCNCPCQCRCSCTCVCWCXCYCZ'
        'D0D1D2D3D4D5D6D7D8D9DADBDCDDDEDFDGDHDJDKDMDNDPDQDRDSDTDVDWDXDYDZ'
        'E0E1E2E3E4E5E6E7E8E9EAEBECEDEEEFEGEHEJEKEMENEPEQERESETEVEWEXEYEZ'
        'F0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFFFGFHFJFKFMFNFPFQFRFSFTFVFWFXFYFZ'
        'G0G1G2G3G4G5G6G7G8G9GAGBGCGDGEGFGGGHGJGKGMGNGPGQGRGSGTGVGWGXGYGZ'
        'H0H1H2H3H4H5H6H7H8H9HAHBHCHDHEHFHGHHHJHKHMHNHPHQHRHSHTHVHWHXHYHZ'
        'J0J1J2J3J4J5J6J7J8J9JAJBJCJDJEJFJGJHJJJKJMJNJPJQJRJSJTJVJWJXJYJZ'
        'K0K1K2K3K4K5K6K7K8K9KAKBKCKDKEKFKGKHKJKKKMKNKPKQKRKSKTKVKWKXKYKZ'
        'M0M1M2M3M4M5M6M7M8M9MAMBMCMDMEMFMGMHMJMKMMMNMPMQMRMSMTMVMWMXMYMZ'
        'N0N1N2N3N4N5N6N7N8N9NANBNCNDNENFNGNHNJNKNMNNNPNQNRNSNTNVNWNXNYNZ'
        'P0P1P2P3P4P5P6P7P8P9PAPBPCPDPEPFPGPHPJPKPMPNPPPQPRPSPTPVPWPXPYPZ'
        'Q0Q1Q2Q3Q4Q5Q6Q7Q8Q9QAQBQCQDQEQFQGQHQJQKQMQNQPQQQRQSQTQVQWQXQYQZ'
        'R0R1R2R3R4R5R6R7R8R9RARBRCRDRERFRGRHRJRKRMRNRPRQRRRSRTRVRWRXRYRZ'
        'S0S1S2S3S4S5S6S7S8S9SASBSCSDSESFSGSHSJSKSMSNSPSQSRSSSTSVSWSXSYSZ'
        'T0T1T2T3T4T5T6T7T8T9TATBTCTDTETFTGTHTJTKTMTNTPTQTRTSTTTVTWTXTYTZ'
        'V0V1V2V3V4V5V6V7V8V9VAVBVCVDVEVFVGVHVJVKVMVNVPVQVRVSVTVVVWVXVYVZ'
        'W0W1W2W3W4W5W6W7W8W9WAWBWCWDWEWFWGWHWJWKWMWNWPWQWRWSWTWVWWWXWYWZ'
        'X0X1X2X3X4X5X6X7X8X9XAXBXCXDXEXFXGXHXJXKXMXNXPXQXRXSXTXVXWXXXYXZ'
        'Y0Y1Y2Y3Y4Y5Y6Y7Y8Y9YAYBYCYDYEYFYGYHYJYKYMYNYPYQYRYSYTYVYWYXYYYZ'
        'Z0Z1Z2Z3Z4Z5Z6Z7Z8Z9ZAZBZCZDZEZFZGZHZJZKZMZNZPZQZRZSZTZVZWZXZYZZ'::pg_catalog.bytea;
    u constant pg_catalog.uuid := pg_catalog.gen_random_uuid();
    us constant bigint := pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()) operator(pg_catalog.*) 1000000;
    upper constant integer := us operator(pg_catalog./) 1000 operator(pg_catalog.>>) 20;
    lower constant integer := us operator(pg_catalog./) 1000 operator(pg_catalog.&) 1048575;
    fine constant integer := us operator(pg_catalog.%) 1000;
begin
    -- Ten bits, times two, plus one: where their pair of digits begins.
    return pg_catalog.encode(pg_catalog.substr(pairs, upper operator(pg_catalog.>>) 19 operator(pg_catalog.&) 2046 operator(pg_catalog.|) 1, 2)
            operator(pg_catalog.||) pg_catalog.substr(pairs, upper operator(pg_catalog.>>) 9 operator(pg_catalog.&) 2046 operator(pg_catalog.|) 1, 2)
            operator(pg_catalog.||) pg_catalog.substr(pairs, upper operator(pg_catalog.+) upper operator(pg_catalog.&) 2046 operator(pg_catalog.|) 1, 2)
            operator(pg_catalog.||) pg_catalog.substr(pairs, lower operator(pg_catalog.>>) 9 operator(pg_catalog.&) 2046 operator(pg_catalog.|) 1, 2)
            operator(pg_catalog.||) pg_catalog.substr(pairs, lower operator(pg_catalog.+) lower operator(pg_catalog.&) 2046 operator(pg_catalog.|) 1, 2)
            operator(pg_catalog.||) pg_catalog.substr(pairs, fine operator(pg_catalog.+) fine operator(pg_catalog.&) 2046 operator(pg_catalog.|) 1, 2), 'escape')
        -- 96 bits, of which 70 random ones are in the first 14 characters.
        operator(pg_catalog.||) pg_catalog.translate(pg_catalog.upper(pg_catalog.left(pg_catalog.encode(
            pg_catalog.int8send(pg_catalog.uuid_hash_extended(u, 1) operator(pg_catalog.|) -9076969306111049208)
            operator(pg_catalog.||) pg_catalog.int4send(pg_catalog.uuid_hash(u) operator(pg_catalog.|) 545392672),
            'base64'), 14) collate pg_catalog."C"), 'ILOU+/', 'ABCDEF');
end
$$;
