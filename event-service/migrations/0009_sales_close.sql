-- When the sale of a session closes: at `sales_end`, which may lie inside the session, or else when it begins.

create function session_sales_close(start_time timestamptz, end_time timestamptz, sales_end timestamptz) returns timestamptz
    language sql immutable parallel safe
    return least(coalesce(sales_end, start_time), end_time);

-- Until now a later `sales_end` meant the beginning. It stays so for the sessions that have one.
update sessions set sales_end = start_time
where sales_end > start_time and (sales_start is null or sales_start < start_time);
