-- Whoever looks for a reservation's payments wants one that is alive, and `payments_one_live_per_reservation` has those. This index had the
-- declined ones as well, for nobody, and was written twice a purchase.

drop index payments_by_reservation;
