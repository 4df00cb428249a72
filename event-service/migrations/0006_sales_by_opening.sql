-- The metrics show the seats of the sessions whose sale opened last, and look for them every few seconds.
create index sessions_by_sale_opening on sessions (coalesce(sales_start, created_at)) where status = 'scheduled';
