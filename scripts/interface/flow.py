"""The whole flow, organizer to refund, with the clients generated from the two OpenAPI documents.

Usage: flow.py EVENT_SERVICE_URL BOOKING_SERVICE_URL REAL_IDS_FILE USER_ID HEADER
HEADER says who calls: that user, who may also do what an organizer may.
Leaves a session on sale behind, and writes its ids into REAL_IDS_FILE for hooks.py.
"""

import datetime
import json
import sys
import uuid

import booking_client
import event_client
from booking_client import models as booking
from booking_client.api.tag1_price_tiers import create_price_tier, update_price_tier
from booking_client.api.tag2_reservations import (
    cancel_reservation,
    confirm_reservation,
    create_reservation,
    get_reservation,
    list_reservations,
)
from booking_client.api.tag3_tickets import get_ticket, get_ticket_qr, list_tickets, refund_ticket
from event_client import models as event
from event_client.api.tag1_organizers import create_organizer, get_organizer, update_organizer
from event_client.api.tag2_events import create_event, list_events
from event_client.api.tag3_locations import create_location
from event_client.api.tag4_halls_and_seats import create_hall, create_seats, list_seats
from event_client.api.tag5_sessions import create_session, get_seat_map, list_sessions

SEATS = 1000


def answered(response, status):
    """The parsed body of an answer that must have this status."""
    assert response.status_code == status, f"expected {status}, got {response.status_code}: {response.content[:2000]!r}"
    return response.parsed


def make_session(client):
    made = answered(create_organizer.sync_detailed(client=client, body=event.CreateOrganizer(name="Generated")), 201)
    stale = '"0"'
    change = event.UpdateOrganizer(description="By a generated client")
    refused = update_organizer.sync_detailed(made.organizer_id, client=client, body=change, if_match=stale)
    assert answered(refused, 412).code == event.Code.PRECONDITION_FAILED
    seen = get_organizer.sync_detailed(made.organizer_id, client=client)
    changed = update_organizer.sync_detailed(
        made.organizer_id, client=client, body=change, if_match=seen.headers["etag"]
    )
    assert answered(changed, 200).description == "By a generated client"

    show = event.CreateEvent(
        organizer_id=made.organizer_id, title=f"Generated {uuid.uuid4()}", event_type=event.EventType.CONCERT
    )
    show = answered(create_event.sync_detailed(client=client, body=show), 201)
    found = answered(list_events.sync_detailed(client=client, q=show.title.upper()), 200)
    assert [item.event_id for item in found.items] == [show.event_id]

    place = event.CreateLocation(
        name="Arena", address="1 Example Street", city="Lisbon", country="Portugal", timezone="Europe/Lisbon"
    )
    place = answered(create_location.sync_detailed(client=client, body=place), 201)
    hall = event.CreateHall(name="Hall", capacity=SEATS)
    hall = answered(create_hall.sync_detailed(place.location_id, client=client, body=hall), 201)
    grid = event.CreateSeats(rows=SEATS // 20, seats_per_row=20)
    assert answered(create_seats.sync_detailed(hall.hall_id, client=client, body=grid), 201).created == SEATS
    page = answered(list_seats.sync_detailed(hall.hall_id, client=client, limit=500), 200)
    rest = answered(list_seats.sync_detailed(hall.hall_id, client=client, limit=500, cursor=page.next_cursor), 200)
    assert len({seat.seat_id for seat in page.items + rest.items}) == SEATS

    begin = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=30)
    session = event.CreateSession(
        event_id=show.event_id,
        hall_id=hall.hall_id,
        start_time=begin,
        end_time=begin + datetime.timedelta(hours=2),
        base_price=100.0,
    )
    session = answered(create_session.sync_detailed(client=client, body=session), 201)
    listed = answered(list_sessions.sync_detailed(client=client, event_id=show.event_id), 200)
    assert listed.items[0].available_seats_count == SEATS
    return session.session_id


def status_of(client, session_id, session_seat_id):
    seats = answered(get_seat_map.sync_detailed(session_id, client=client), 200).seats
    return next(seat.status.value for seat in seats if seat.session_seat_id == session_seat_id)


def book(client, session_id, tier_id, seats):
    wanted = [
        booking.WantedSeat(
            session_seat_id=seat.session_seat_id,
            price_tier_id=tier_id,
            row_number=seat.row_number,
            seat_number=seat.seat_number,
        )
        for seat in seats
    ]
    body = booking.CreateReservation(session_id=session_id, seats=wanted)
    key = str(uuid.uuid4())
    first = create_reservation.sync_detailed(client=client, body=body, idempotency_key=key)
    again = create_reservation.sync_detailed(client=client, body=body, idempotency_key=key)
    assert again.headers["idempotency-replayed"] == "true"
    assert answered(first, 201).id == answered(again, 201).id
    assert first.headers["location"] == f"/api/v1/reservations/{first.parsed.id}"
    return first.parsed


def main(event_url, booking_url, real_ids_file, user_id, header):
    user_id = uuid.UUID(user_id)
    headers = dict([header.split(": ", 1)])
    events = event_client.Client(base_url=event_url, headers=headers)
    bookings = booking_client.Client(base_url=booking_url, headers=headers)
    nobody = booking_client.Client(base_url=booking_url)

    session_id = make_session(events)
    tier = booking.CreatePriceTier(name="Generated", base_multiplier=1.0)
    tier = answered(create_price_tier.sync_detailed(client=bookings, body=tier), 201)
    tier = update_price_tier.sync_detailed(
        tier.id, client=bookings, body=booking.UpdatePriceTier(base_multiplier=1.25)
    )
    tier = answered(tier, 200)
    seats = answered(get_seat_map.sync_detailed(session_id, client=events), 200).seats

    reservation = book(bookings, session_id, tier.id, seats[:2])
    assert reservation.total_amount == 250.0
    assert status_of(events, session_id, seats[0].session_seat_id) == "reserved"
    refused = create_reservation.sync_detailed(
        client=nobody, body=booking.CreateReservation(session_id=session_id, seats=[])
    )
    assert answered(refused, 401).code == booking.Code.UNAUTHENTICATED
    paid = answered(confirm_reservation.sync_detailed(reservation.id, client=bookings, body=booking.ConfirmReservation()), 200)
    assert len(paid.tickets) == 2

    ticket = answered(get_ticket.sync_detailed(paid.tickets[0].id, client=bookings), 200)
    assert ticket.qr_code.startswith("data:image/png;base64,")
    picture = get_ticket_qr.sync_detailed(ticket.id, client=bookings)
    assert picture.content.startswith(b"\x89PNG"), picture.content[:8]
    assert len(answered(list_tickets.sync_detailed(user_id, client=bookings), 200)) == 2
    assert answered(refund_ticket.sync_detailed(ticket.id, client=bookings, body=booking.RefundTicket()), 200).status.value == "refunded"

    given_up = book(bookings, session_id, tier.id, seats[2:3])
    assert answered(cancel_reservation.sync_detailed(given_up.id, client=bookings), 200).status.value == "cancelled"
    assert status_of(events, session_id, seats[2].session_seat_id) == "available"
    late = confirm_reservation.sync_detailed(given_up.id, client=bookings, body=booking.ConfirmReservation())
    assert answered(late, 409).code == booking.Code.RESERVATION_CANCELLED
    own = answered(list_reservations.sync_detailed(client=bookings), 200)
    assert [item.id for item in own.items] == [given_up.id, reservation.id]
    assert answered(get_reservation.sync_detailed(uuid.uuid4(), client=bookings), 404).code.value == "reservation_not_found"

    with open(real_ids_file, "w", encoding="utf-8") as file:
        labels = ("session_seat_id", "row_number", "seat_number")
        json.dump(
            {
                "session_id": str(session_id),
                "price_tier_id": str(tier.id),
                "user_id": str(user_id),
                "seats": [{name: str(getattr(seat, name)) for name in labels} for seat in seats[2:]],
            },
            file,
        )
    print("The generated clients did the whole flow, organizer to refund.")


if __name__ == "__main__":
    main(*sys.argv[1:])
