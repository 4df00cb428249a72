//! Reservations: how they are made, shown, listed and refused.

use futures::future::join_all;
use serde_json::json;
use service_kit::testing::wait_until;
use uuid::Uuid;

use crate::support::{SOON, System, answer, text_of};

#[tokio::test]
async fn a_reservation_holds_its_seats_at_the_tiers_price() {
    let system = System::start().await;
    let mut sale = system.sale(3).await;
    sale.tier = system.tier(json!(1.5)).await;
    let user = Uuid::now_v7();
    let response = system.try_reserve(&sale, user, &[0, 2]).await;
    let location = response.headers()["location"].to_str().unwrap().to_owned();
    let text = response.text().await.unwrap();
    assert!(text.contains("\"total_amount\":300.00"), "{text}");
    let made: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&made["status"], &made["seats_count"], &made["currency"]),
        (&json!("active"), &json!(2), &json!("USD"))
    );
    assert!((595..=600).contains(&made["time_remaining_seconds"].as_i64().unwrap()));
    let mut shown = system.get(&location, user, 200).await;
    shown["time_remaining_seconds"] = made["time_remaining_seconds"].clone();
    assert_eq!(shown, made, "the answer is not what is stored");
    assert_eq!(system.statuses(&sale.session).await, ["reserved", "available", "reserved"]);
    assert_eq!(system.lock_owner(&sale, 0).await, Some(text_of(&made, "id")));
    system.finish().await;
}

#[tokio::test]
async fn a_refusal_names_the_taken_seat_and_holds_none_of_the_others() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    system.reserved(&sale, &[1]).await;
    let refused = system.reserve(&sale, Uuid::now_v7(), &[0, 1, 2], 409).await;
    assert_eq!(
        (&refused["code"], &refused["seats"]),
        (&json!("seat_unavailable"), &json!([{ "session_seat_id": sale.seats[1], "status": "reserved" }]))
    );
    assert_eq!(system.statuses(&sale.session).await, ["available", "reserved", "available"]);
    assert_eq!(system.lock_owner(&sale, 0).await, None);
    system.finish().await;
}

#[tokio::test]
async fn the_code_names_what_is_unknown() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let order = |change: fn(&mut serde_json::Value, String)| {
        let mut order = sale.order(&[0]);
        change(&mut order, Uuid::now_v7().to_string());
        order
    };
    let cases = [
        (order(|order, id| order["session_id"] = id.into()), "session_not_found"),
        (order(|order, id| order["seats"][0]["session_seat_id"] = id.into()), "seat_not_found"),
        (order(|order, id| order["seats"][0]["price_tier_id"] = id.into()), "price_tier_not_found"),
    ];
    for (body, code) in cases {
        let response = system.call(reqwest::Method::POST, "/api/v1/reservations", Uuid::now_v7(), Some(&body)).await;
        assert_eq!(answer(response, 404).await["code"], code);
    }
    let tier = json!({ "name": "Other", "base_multiplier": 1, "session_id": Uuid::now_v7() });
    let response = system.call(reqwest::Method::POST, "/api/v1/price-tiers", Uuid::now_v7(), Some(&tier)).await;
    let mut foreign = sale.clone();
    foreign.tier = text_of(&answer(response, 201).await, "id");
    assert_eq!(system.reserve(&foreign, Uuid::now_v7(), &[0], 404).await["code"], "price_tier_not_found");
    assert_eq!(system.statuses(&sale.session).await, ["available"]);
    system.finish().await;
}

#[tokio::test]
async fn an_order_that_contradicts_the_seat_map_is_refused() {
    let system = System::start().await;
    let sale = system.sale(2).await;
    let mut order = sale.order(&[0, 1]);
    order["seats"][1]["row_number"] = "9".into();
    order["seats"][0]["seat_number"] = "2".into();
    let response = system.call(reqwest::Method::POST, "/api/v1/reservations", Uuid::now_v7(), Some(&order)).await;
    let problem = answer(response, 422).await;
    let pointers: Vec<_> = problem["errors"].as_array().unwrap().iter().map(|error| error["pointer"].clone()).collect();
    assert_eq!(pointers, ["/seats/0/seat_number", "/seats/1/row_number"]);
    assert_eq!(system.lock_owner(&sale, 0).await, None, "a refused order left a lock");
    assert_eq!(system.statuses(&sale.session).await, ["available", "available"], "a refused order left a hold");

    assert_eq!(
        system.reserve(&sale, Uuid::now_v7(), &[0, 0], 422).await["errors"][0]["pointer"],
        "/seats/1/session_seat_id"
    );
    let many = system.sale(11).await;
    let all: Vec<usize> = (0..11).collect();
    assert_eq!(system.reserve(&many, Uuid::now_v7(), &all, 422).await["errors"][0]["pointer"], "/seats");
    system.reserve(&many, Uuid::now_v7(), &all[..10], 201).await;
    system.finish().await;
}

#[tokio::test]
async fn a_user_does_not_see_another_users_reservation() {
    let system = System::start().await;
    let sale = system.sale(3).await;
    let (id, owner) = system.reserved(&sale, &[0]).await;
    let stranger = Uuid::now_v7();
    let path = format!("/api/v1/reservations/{id}");
    assert_eq!(system.get(&path, stranger, 404).await["code"], "reservation_not_found");
    system.confirm(&id, stranger, None, 404).await;
    system.cancel(&id, stranger, 404).await;
    assert_eq!(system.get("/api/v1/reservations", stranger, 200).await["items"], json!([]));
    system.get(&path, owner, 200).await;
    let anonymous = system.http.get(format!("{}{path}", system.booking_base)).send().await.unwrap();
    assert_eq!(answer(anonymous, 401).await["code"], "unauthenticated");
    system.finish().await;
}

#[tokio::test]
async fn a_customer_lists_their_reservations_newest_first_in_pages() {
    let system = System::start().await;
    let sale = system.sale(5).await;
    let user = Uuid::now_v7();
    let mut made = Vec::new();
    for seat in 0..5 {
        made.insert(0, text_of(&system.reserve(&sale, user, &[seat], 201).await, "id"));
    }
    system.cancel(&made[0], user, 200).await;
    let (mut seen, mut path) = (Vec::new(), "/api/v1/reservations?limit=2".to_owned());
    loop {
        let page = system.get(&path, user, 200).await;
        seen.extend(page["items"].as_array().unwrap().iter().map(|item| text_of(item, "id")));
        assert!(page["items"].as_array().unwrap().iter().all(|item| item["items"].as_array().unwrap().len() == 1));
        let Some(cursor) = page["next_cursor"].as_str() else {
            break;
        };
        path = format!("/api/v1/reservations?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, made);
    let cancelled = system.get("/api/v1/reservations?status=cancelled", user, 200).await;
    assert_eq!(cancelled["items"].as_array().unwrap().len(), 1);
    system.finish().await;
}

#[tokio::test]
async fn seats_are_sold_only_while_their_session_is_on_sale() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let cases = [
        ("sales_start = now() + interval '1 hour'", "sales_not_started"),
        ("sales_start = null, sales_end = now() - interval '1 hour'", "sales_ended"),
        (
            "sales_end = null, start_time = now() - interval '1 minute', end_time = now() + interval '1 hour'",
            "sales_ended",
        ),
        ("status = 'cancelled', cancelled_at = now()", "session_cancelled"),
    ];
    for (change, code) in cases {
        let sql = format!("update sessions set {change}");
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&system.event_db).await.unwrap();
        let problem = system.reserve(&sale, Uuid::now_v7(), &[0], 409).await;
        assert_eq!(problem["code"], code, "{problem}");
    }
    let open = "update sessions set status = 'scheduled', cancelled_at = null, sales_start = now() - interval '1 minute', start_time = now() + interval '1 hour', end_time = now() + interval '2 hours'";
    sqlx::query(open).execute(&system.event_db).await.unwrap();
    system.reserved(&sale, &[0]).await;
    system.finish().await;
}

/// The worker would free them too, but later, and the next buyer should not wait for it.
#[tokio::test]
async fn a_booking_that_the_database_rejects_frees_its_seats_at_once() {
    let system = System::start().await;
    let sale = system.sale(1).await;
    let spoil = "alter table reservation_items add constraint spoilt check (false) not valid";
    sqlx::query(spoil).execute(&system.app.db).await.unwrap();
    let refused = system.try_reserve(&sale, Uuid::now_v7(), &[0]).await;
    assert!(refused.status().is_server_error(), "{}", refused.status());
    assert_eq!(system.statuses(&sale.session).await, ["available"]);
    assert_eq!(system.lock_owner(&sale, 0).await, None);
    sqlx::query("alter table reservation_items drop constraint spoilt").execute(&system.app.db).await.unwrap();
    system.reserve(&sale, Uuid::now_v7(), &[0], 201).await;
    system.finish().await;
}

/// The database is busy, so many bookings are written in one batch. Meanwhile one of them loses its key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_booking_that_lost_its_key_does_not_fail_the_others_in_its_batch() {
    let system = System::start().await;
    let sale = system.sale(20).await;
    let users: Vec<Uuid> = (0..20).map(|_| Uuid::now_v7()).collect();
    let mut busy = service_kit::postgres::database::begin(&system.app.db).await.unwrap();
    sqlx::query("lock table reservations in exclusive mode").execute(&mut *busy).await.unwrap();
    let bookings = users.iter().enumerate().map(|(seat, user)| {
        let request = system.http.post(format!("{}/api/v1/reservations", system.booking_base));
        let request = request.header("x-user-id", user.to_string()).header("idempotency-key", "only");
        let request = request.json(&sale.order(&[seat]));
        async move { request.send().await.unwrap().status().as_u16() }
    });
    let interfere = async {
        wait_until("all seats are held", SOON, async || {
            system.statuses(&sale.session).await.iter().all(|status| status == "reserved")
        })
        .await;
        let sql = "update idempotency_keys set attempt = gen_random_uuid() where user_id = $1";
        sqlx::query(sql).bind(users[7]).execute(&system.app.db).await.unwrap();
        busy.rollback().await.unwrap();
    };
    let (answers, ()) = tokio::join!(join_all(bookings), interfere);
    let others = answers.iter().enumerate().filter(|(seat, _)| *seat != 7);
    assert!(others.clone().all(|(_, status)| *status == 201), "{answers:?}");
    assert_eq!((answers[7], system.statuses(&sale.session).await[7].as_str()), (409, "available"));
    assert_eq!(system.count("select count(*) from reservations where status = 'active'").await, 19);
    system.finish().await;
}
