"""Puts real ids into generated requests: without them nearly all requests end in a 404.

REAL_IDS names a JSON file: {"session_id", "price_tier_id", "user_id", "seats": [{"session_seat_id", "row_number", "seat_number"}]}.
An id is replaced only where the generator put a well-formed one, so that what is meant to be wrong stays wrong.
"""

import itertools
import json
import os
import uuid

import schemathesis
from hypothesis import strategies

with open(os.environ["REAL_IDS"], encoding="utf-8") as file:
    REAL = json.load(file)
SEATS = itertools.cycle(REAL["seats"])
# A generated tag almost never matches the current one, so every second edit has no tag.
DROP_TAG = itertools.cycle([True, False])


# Formats of our own. Without them nearly all generated names would have an invisible character, and be refused.
FILLERS = "\u034f\u115f\u1160\u3164\uffa0\u2800"
SEEN = strategies.characters(categories=("Lu", "Ll", "Lt", "Lm", "Lo", "Nd", "Pd", "Po", "Sm", "Sc"), exclude_characters=FILLERS)
ONE_LINE = strategies.text(SEEN | strategies.just(" "), min_size=1, max_size=32).filter(str.strip)
schemathesis.openapi.format("label", ONE_LINE)
schemathesis.openapi.format("title", ONE_LINE)
schemathesis.openapi.format("prose", strategies.text(SEEN | strategies.sampled_from(" \n\t"), max_size=200))


def well_formed(value):
    try:
        return isinstance(value, str) and str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


def replace(container, name, real):
    if isinstance(container, dict) and well_formed(container.get(name)):
        container[name] = real


def is_text(value):
    return isinstance(value, (str, int)) and not isinstance(value, bool)


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation.definition.raw.get("operationId", "")
    body = case.body
    if case.headers and "If-Match" in case.headers and next(DROP_TAG):
        del case.headers["If-Match"]
    if operation == "create_reservation":
        replace(body, "session_id", REAL["session_id"])
        for wanted in body.get("seats", []) if isinstance(body, dict) and isinstance(body.get("seats"), list) else []:
            if not isinstance(wanted, dict):
                continue
            seat = next(SEATS)
            replace(wanted, "price_tier_id", REAL["price_tier_id"])
            replace(wanted, "session_seat_id", seat["session_seat_id"])
            for label in ("row_number", "seat_number"):
                if is_text(wanted.get(label)):
                    wanted[label] = seat[label]
    elif operation in ("check_availability", "reserve_seats", "release_seats", "confirm_seats"):
        replace(case.path_parameters, "session_id", REAL["session_id"])
        ids = body.get("session_seat_ids") if isinstance(body, dict) else None
        if isinstance(ids, list):
            body["session_seat_ids"] = [next(SEATS)["session_seat_id"] if well_formed(id) else id for id in ids]
    elif operation in ("get_pricing", "stream_seat_map"):
        replace(case.path_parameters, "session_id", REAL["session_id"])
    elif operation in ("cancel_session", "update_session", "delete_session"):
        # Lists also lead to the real session, which the rest of the run needs unchanged.
        if case.path_parameters.get("session_id") == REAL["session_id"]:
            case.path_parameters["session_id"] = str(uuid.uuid4())
    elif operation == "list_tickets":
        replace(case.path_parameters, "user_id", REAL["user_id"])
