"""Conversations of agents, for the demo: written for this project, and varied by templates.

Each scenario is a conversation between three agents, turn by turn. A turn may add a fact about its subject, revise
an earlier one, or remove one. ``{names}`` are filled in from the scenario's own lists: differently in every room, and
always in the same way for the same number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count


@dataclass(frozen=True, slots=True)
class Turn:
    """What one of the three says; ``learn``, ``revise`` and ``forget`` name facts by a key of the room."""

    speaker: int
    text: str
    learn: tuple[str, str] | None = None
    revise: tuple[str, str] | None = None
    forget: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A room: its name, its subject, and its turns with every name filled in."""

    room: str
    entity: str
    world: str
    began: datetime
    turns: tuple[Turn, ...]

    @property
    def writes(self) -> int:
        """The number of its writes: one for each turn, and one for each fact that is added, revised or removed."""
        return sum(1 + bool(t.learn) + bool(t.revise) + bool(t.forget) for t in self.turns)


@dataclass(frozen=True, slots=True)
class _Scenario:
    world: str
    entity: str
    slots: dict[str, tuple[str, ...]]
    turns: tuple[Turn, ...]


_PEOPLE = (
    "Amara",
    "Bente",
    "Chidi",
    "Dario",
    "Eun-ji",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Katya",
    "Lucía",
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")

_SCENARIOS = (
    _Scenario(
        "travel",
        "{who}",
        {
            "who": _PEOPLE,
            "city": ("Lisbon", "Kraków", "Oaxaca", "Kyoto", "Tbilisi", "Trieste", "Valparaíso"),
            "day": _DAYS,
            "later": ("the 3rd", "the 9th", "the 14th", "the 21st", "the 27th"),
            "diet": ("vegetarian", "vegan", "coeliac", "allergic to shellfish", "off dairy"),
            "budget": ("900", "1,200", "1,650", "2,100", "2,800"),
        },
        (
            Turn(0, "{who} wants four days in {city} and asked us to plan it."),
            Turn(1, "Dates? And is there a budget?"),
            Turn(
                0,
                "Leaving on {day}. {budget} euros, everything included.",
                learn=("budget", "{budget} euros in all"),
            ),
            Turn(
                2,
                "I remember {who} being {diet}. I will keep that in mind for restaurants.",
                learn=("diet", "{diet}"),
            ),
            Turn(1, "Trains on {day} are nearly full. Two seats left at 7:40, or a night connection."),
            Turn(0, "{who} does not sleep on trains. Take the 7:40."),
            Turn(
                1,
                "Held until midnight. I need a passport number by then.",
                learn=("train", "7:40 on {day}, on hold"),
            ),
            Turn(
                2,
                "Three places to stay, all within walking distance of the old town. I lean to the courtyard one.",
            ),
            Turn(
                0,
                "{who} just wrote: the trip moves to {later}. Same budget.",
                revise=("train", "{later}, to be booked"),
            ),
            Turn(1, "Releasing the seats. The fares on {later} are lower, as it happens."),
            Turn(
                2,
                "The courtyard place has a room for those nights too. Booked, free to cancel.",
                learn=("stay", "courtyard room, free to cancel"),
            ),
            Turn(
                1, "Train booked for {later}, window seat.", revise=("train", "{later}, window seat, booked")
            ),
            Turn(0, "Sending {who} the whole plan. Thank you both."),
        ),
    ),
    _Scenario(
        "operations",
        "{service}",
        {
            "service": ("checkout", "search-api", "ledger", "mailer", "thumbnails", "sessions", "billing"),
            "metric": ("p99 latency", "the error rate", "queue depth", "memory", "open connections"),
            "cause": (
                "a deploy at noon that halved the connection pool",
                "a certificate that expired on the standby",
                "a retry loop without backoff",
                "an index that the planner stopped using",
                "a log volume that filled up",
            ),
            "who": _PEOPLE,
            "minutes": ("12", "18", "25", "31", "44"),
        },
        (
            Turn(0, "Alert for {service}, {metric}: three times the usual value, for {minutes} minutes now."),
            Turn(
                1,
                "Looking. No deploy of {service} itself today.",
                learn=("state", "degraded, being looked at"),
            ),
            Turn(2, "Customers notice: eleven tickets in the last quarter of an hour, all about {service}."),
            Turn(0, "Paging {who}, who is on call.", learn=("owner", "{who}")),
            Turn(
                1,
                "First guess is the cache tier; its hit ratio fell at the same moment.",
                learn=("suspect", "the cache tier"),
            ),
            Turn(0, "{who} checked: the cache fell because its callers timed out. Effect, not cause."),
            Turn(1, "Agreed, taking that back.", forget="suspect"),
            Turn(1, "Found it: {cause}.", learn=("cause", "{cause}")),
            Turn(2, "Can I tell customers something?"),
            Turn(0, "Say that we know the cause and expect a fix within {minutes} minutes."),
            Turn(
                1, "Fix is out, and {metric}: back towards normal.", revise=("state", "fixed, being watched")
            ),
            Turn(2, "Tickets have stopped. Answering the eleven now."),
            Turn(0, "Quiet for {minutes} minutes. Closing; {who} writes it up.", revise=("state", "closed")),
        ),
    ),
    _Scenario(
        "support",
        "{customer}",
        {
            "customer": (
                "Ortega & Sons",
                "Blue Heron Books",
                "Kivi Dental",
                "Northgate Choir",
                "Atelier Moreau",
                "Sable Cycling",
            ),
            "plan": ("starter", "team", "studio", "enterprise"),
            "issue": (
                "invoices go to an address that they left in spring",
                "exports stop after the first thousand rows",
                "single sign-on loops back to the login page",
                "the calendar shows every event twice",
            ),
            "who": _PEOPLE,
            "refund": ("one month", "two weeks", "the setup fee", "half of March"),
        },
        (
            Turn(0, "{customer} writes: {issue}."),
            Turn(
                1,
                "They are on the {plan} plan since last year. {who} is their contact.",
                learn=("contact", "{who}"),
            ),
            Turn(2, "I can reproduce it with their settings.", learn=("issue", "{issue}; reproduced")),
            Turn(0, "{who} is losing patience; this is the third message. Tone: short and concrete."),
            Turn(1, "Offering a refund of {refund} would be within policy.", learn=("offer", "{refund}")),
            Turn(0, "Hold that until we have a fix. An apology without a fix reads badly."),
            Turn(2, "Cause found. It only hits accounts that were moved from the old system."),
            Turn(
                2,
                "Patched for {customer}; the rest follows tonight.",
                revise=("issue", "{issue}; fixed for them"),
            ),
            Turn(0, "{who} confirms that it works, and asks what happens about the lost time."),
            Turn(1, "Then the refund now: {refund}. Sent.", revise=("offer", "{refund}, accepted")),
            Turn(0, "{who} says thank you, and that they stay. Closing."),
        ),
    ),
    _Scenario(
        "garden",
        "{plot}",
        {
            "plot": (
                "the south beds",
                "the greenhouse",
                "the orchard strip",
                "the herb spiral",
                "the pond edge",
            ),
            "crop": ("tomatoes", "runner beans", "chard", "early potatoes", "sweet peas", "kale"),
            "pest": ("slugs", "aphids", "a mole", "pigeons", "powdery mildew"),
            "school": ("the primary school", "the evening class", "the care home", "the scouts"),
            "day": _DAYS,
        },
        (
            Turn(0, "Soil sensors in {plot}: dry below ten centimetres."),
            Turn(
                1, "No rain before {day}. I would water tonight, not at noon.", learn=("watering", "tonight")
            ),
            Turn(2, "{school} comes on {day} to plant {crop}.", learn=("visit", "{school}, on {day}")),
            Turn(0, "Then the beds should be damp but not muddy. Half the usual amount."),
            Turn(1, "Set to half.", revise=("watering", "tonight, half the usual amount")),
            Turn(
                2,
                "The camera shows {pest} again. That is the second time this month.",
                learn=("pest", "{pest}, twice"),
            ),
            Turn(
                0,
                "Nothing sprayed before children come. Nets and hands only.",
                learn=("rule", "no spraying before a visit"),
            ),
            Turn(1, "Nets ordered; they arrive a day before."),
            Turn(2, "I looked again: that was a shadow, not {pest}.", forget="pest"),
            Turn(1, "Good. I keep the nets anyway, {crop} will need them."),
            Turn(0, "All set for {day}. Seed trays of {crop} go to the front."),
        ),
    ),
    _Scenario(
        "research",
        "{topic}",
        {
            "topic": (
                "glacier runoff",
                "bird migration",
                "urban heat",
                "soil carbon",
                "tidal mixing",
                "night pollinators",
            ),
            "method": (
                "a mixed model",
                "bootstrapped intervals",
                "a state-space model",
                "difference in differences",
            ),
            "who": _PEOPLE,
            "n": ("212", "388", "541", "907", "1,264"),
            "venue": ("the spring workshop", "the regional meeting", "the summer school"),
        },
        (
            Turn(
                0,
                "Starting the write-up on {topic}. {n} observations after cleaning.",
                learn=("sample", "{n} observations"),
            ),
            Turn(1, "Which analysis did we register?"),
            Turn(
                0, "{method}, with site as a random effect where it applies.", learn=("analysis", "{method}")
            ),
            Turn(2, "I reran the cleaning. Seventeen rows had a unit mistake: feet, not metres."),
            Turn(1, "Corrected or dropped?"),
            Turn(
                2,
                "Corrected; the field sheets are unambiguous.",
                revise=("sample", "{n} observations, 17 corrected"),
            ),
            Turn(
                1,
                "The main effect holds. It is smaller than in the pilot.",
                learn=("result", "holds, smaller than in the pilot"),
            ),
            Turn(
                0,
                "Good: the abstract should say so. {who} is to read it before {venue}.",
                learn=("reader", "{who}"),
            ),
            Turn(2, "{who} is away until after {venue}. Somebody else?"),
            Turn(0, "Then I ask around; taking {who} off the list.", forget="reader"),
            Turn(1, "Figures two and four share an axis now."),
            Turn(2, "Data and code are archived, with the corrected rows marked."),
            Turn(0, "Submitted to {venue}."),
        ),
    ),
    _Scenario(
        "kitchen",
        "{dish}",
        {
            "dish": (
                "mushroom pie",
                "fish stew",
                "lentil soup",
                "plum cake",
                "stuffed peppers",
                "barley risotto",
            ),
            "guests": ("14", "22", "36", "48", "60"),
            "missing": ("cream", "dill", "bay leaves", "flour", "stock", "butter"),
            "swap": ("oat cream", "parsley", "thyme", "spelt", "a vegetable base", "olive oil"),
            "hour": ("noon", "half past twelve", "one", "half past six", "seven"),
        },
        (
            Turn(0, "{dish} for {guests} at {hour}.", learn=("order", "{guests} at {hour}")),
            Turn(1, "Stock check: short of {missing}."),
            Turn(
                2,
                "Delivery cannot make it before {hour}. Use {swap} instead?",
                learn=("swap", "{swap} for {missing}"),
            ),
            Turn(0, "Taste first. One portion, then we decide."),
            Turn(1, "Tasted. Better than the original, if you ask me."),
            Turn(
                0,
                "Then {swap} it is. Note it on the menu for allergies.",
                revise=("swap", "{swap} for {missing}, on the menu"),
            ),
            Turn(
                2,
                "Front of house says six more are coming.",
                revise=("order", "{guests} and six more, at {hour}"),
            ),
            Turn(1, "Enough for that, if portions stay honest."),
            Turn(0, "Ovens on. Everything out ten minutes before {hour}."),
            Turn(2, "Plates are warm."),
        ),
    ),
    _Scenario(
        "software",
        "{module}",
        {
            "module": ("parser", "scheduler", "importer", "renderer", "auth", "sync", "exporter"),
            "bug": (
                "drops the last line of a file",
                "counts leap days twice",
                "hangs on an empty list",
                "loses its lock on restart",
            ),
            "who": _PEOPLE,
            "release": ("2.3", "2.4", "3.0", "3.1", "4.0"),
            "day": _DAYS,
        },
        (
            Turn(0, "Report from {who}: {module} {bug}.", learn=("bug", "{module} {bug}")),
            Turn(1, "Got a failing test for it in eleven lines."),
            Turn(
                2, "It has been there since {release}. So it needs a backport.", learn=("since", "{release}")
            ),
            Turn(1, "The fix is one condition. The comment above it was wrong as well."),
            Turn(0, "Please look at the neighbours: the same condition is copied in two places."),
            Turn(1, "Right. One was wrong too; now all three call the same function."),
            Turn(
                2,
                "History says it came in just before {release}, not with it.",
                revise=("since", "just before {release}"),
            ),
            Turn(0, "Reviewed. I would keep the test's name closer to what {who} saw."),
            Turn(1, "Renamed and merged.", revise=("bug", "{module} {bug}; fixed")),
            Turn(2, "Backport goes out on {day}.", learn=("backport", "{day}")),
            Turn(0, "{who} confirms it with a build of the branch. Thank you both."),
        ),
    ),
    _Scenario(
        "books",
        "{reader}",
        {
            "reader": _PEOPLE,
            "book": (
                "the lighthouse novel",
                "the long history of salt",
                "the letters",
                "the whaling diary",
                "the desert poems",
            ),
            "place": ("the café by the canal", "the library annexe", "the harbour bench", "the reading room"),
            "day": _DAYS,
            "page": ("48", "112", "167", "203", "288"),
        },
        (
            Turn(0, "{reader} is on page {page} of {book}.", learn=("page", "page {page} of {book}")),
            Turn(1, "The group meets on {day} in {place}.", learn=("meeting", "{day}, {place}")),
            Turn(2, "No endings before then, please. {reader} minds a lot.", learn=("rule", "no spoilers")),
            Turn(0, "Noted. Questions up to page {page} only."),
            Turn(1, "Here are three, all about the narrator: does she lie, to whom, and when does she stop?"),
            Turn(2, "Keep the second. It is the one that people will argue about."),
            Turn(0, "{reader} has finished it overnight.", revise=("page", "finished {book}")),
            Turn(2, "Then the rule can go.", forget="rule"),
            Turn(
                1,
                "{place} is closed on {day}; we meet at the station instead.",
                revise=("meeting", "{day}, at the station"),
            ),
            Turn(0, "Telling {reader}. See you there."),
        ),
    ),
)


def conversations(writes: int) -> list[Conversation]:
    """Conversations that take at least this many writes together; always the same ones."""
    out: list[Conversation] = []
    total = 0
    for conversation in _endless():
        if total >= writes:
            break
        out.append(conversation)
        total += conversation.writes
    return out


def _endless() -> Iterator[Conversation]:
    start = datetime(2025, 3, 3, 8, tzinfo=UTC)
    for number in count():
        scenario = _SCENARIOS[number % len(_SCENARIOS)]
        pick = random.Random(number)
        names = {slot: pick.choice(values) for slot, values in scenario.slots.items()}
        yield Conversation(
            room=f"{scenario.world}-{number:04}",
            entity=f"{scenario.entity.format(**names)} {number:04}",
            world=scenario.world,
            began=start + timedelta(hours=number),
            turns=tuple(_filled(turn, names) for turn in scenario.turns),
        )


def _filled(turn: Turn, names: dict[str, str]) -> Turn:
    def fact(pair: tuple[str, str] | None) -> tuple[str, str] | None:
        return pair and (pair[0], pair[1].format(**names))

    text = turn.text.format(**names)
    return Turn(turn.speaker, text[:1].upper() + text[1:], fact(turn.learn), fact(turn.revise), turn.forget)
