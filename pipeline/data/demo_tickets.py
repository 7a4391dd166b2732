"""Invented support tickets with their triage as strict JSON: the demo's data, a task that has to be learned.

    python -m pipeline.data.demo_tickets FOLDER --train 800 --holdout 240 --seed 42

writes FOLDER/tickets-train.jsonl and FOLDER/tickets-holdout.jsonl, one TRL conversation a line. The answer
follows from the text by fixed rules:

- `category` is that of the problem sentence, `priority` that of the impact sentence;
- `product` is the product's name in the text;
- `entities` are the codes and mail addresses in order of appearance.

The prompt lists neither categories nor priorities, so an untuned model can't know them.

A holdout ticket never shares its pair of problem and impact sentence, its names, codes or addresses with a
training ticket. Some of its sentences occur in no training ticket at all. The same seed and size give the same
bytes; a larger size starts with the rows of the smaller one.

Limits: English, one problem a ticket, a closed list of products. The task shows that the chain works; it says
nothing about how good a model is. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "holdout"]

SYSTEM = "Triage the ticket as JSON: category, priority, product, entities."
PRODUCTS = ("Atlas", "Beacon", "Comet", "Falcon", "Harbor", "Lantern", "Orchid", "Willow")

# (a|b) is a choice, drawn for each ticket. {product} {invoice} {error} {order} {mail} are filled in.
# The last RESERVED sentences of every list are the holdout's alone.
RESERVED = 2
PROBLEMS: dict[str, tuple[str, ...]] = {
    "billing": (
        "We were (charged|billed) twice for {product} (this month|in May|last week), see {invoice}.",
        "(Invoice|The bill) {invoice} for {product} shows the wrong (amount|VAT number|currency).",
        "Please refund {invoice}, our {product} plan was (paid|settled) already.",
        "My card (keeps being|was) declined when I pay for {product}.",
        "{product} costs more than the quote said, the difference is on {invoice}.",
        "(Can|Could) you send the {product} receipt for {invoice} to {mail}?",
        "The (discount|voucher|coupon) for {product} is missing from {invoice}.",
        "Why did the {product} subscription price go up on {invoice}?",
        "We paid {invoice} for {product} by bank transfer, but you (sent a reminder|say it is overdue).",
        "Our accountant asks for a (credit note|corrected bill) on {invoice}, it is for {product}.",
        "{invoice} lists twelve {product} seats although we pay for (nine|ten|eight).",
        "Money for {product} was taken from the wrong bank account, reference {invoice}.",
    ),
    "login": (
        "I (can't|cannot) sign in to {product}, it says my password is wrong.",
        "The {product} password reset mail never (arrives|comes) at {mail}.",
        "{product} rejects my (two-factor|authenticator|six-digit) code.",
        "My {product} account {mail} is locked after (three|five|too many) attempts.",
        "Single sign-on to {product} (fails|stops) with {error}.",
        "{product} logs me out (every few minutes|as soon as I sign in|again and again).",
        "(Our new colleague|The intern|My assistant) {mail} can't get into {product}.",
        "I lost my phone and can't pass the {product} login check.",
        "The invitation link to {product} has expired before I could (use it|set a password).",
        "After the domain change nobody can log in to {product} as {mail}.",
        "{product} tells me that user {mail} does not exist when I sign in.",
        "My fingerprint no longer opens {product} and the fallback password is refused.",
    ),
    "bug": (
        "{product} crashes with {error} when I (open a report|save a file|print|attach a photo).",
        "The {product} (export|import) stops halfway and shows {error}.",
        "Totals in {product} are wrong (since the update|since Monday|for last quarter).",
        "{product} shows a blank page (after saving|on the dashboard|in the calendar).",
        "The search in {product} finds nothing (any more|since the last release).",
        "{product} freezes when I (drag a card|sort a table|rename a folder).",
        "Dates in {product} are off by one (day|hour|month).",
        "Every upload to {product} ends in {error}.",
        "{product} sends each notification (twice|three times).",
        "The (filter|undo|share) button in {product} does nothing.",
        "Charts in {product} overlap and the page prints {error} below them.",
        "Pasting text into {product} turns all accents into question marks.",
    ),
    "shipping": (
        "My {product} (box|device|kit) from order {order} has not arrived.",
        "The parcel {order} with our {product} (hub|scanner|unit) was damaged.",
        "We received the wrong {product} model in (order|delivery) {order}.",
        "Tracking for {order} has not moved (for days|since Friday), it holds a {product} set.",
        "The courier left {order} with our {product} at the wrong (address|door|office).",
        "Two of the {product} sensors are missing from {order}.",
        "When will {order} with the {product} (terminal|tablet|printer) be delivered?",
        "Please send the {product} kit of {order} to a new address and confirm to {mail}.",
        "Customs holds our {product} shipment {order} and wants (papers|a value statement).",
        "The {product} return label for {order} (does not open|is unreadable).",
        "Only half of the {product} pallets in {order} came off the truck.",
        "The carrier says {order} with the {product} spare parts went back to the warehouse.",
    ),
    "feature": (
        "It would be (nice|great) if {product} had a dark mode.",
        "Could {product} (learn|get) (keyboard shortcuts|a calendar view|bulk editing)?",
        "We would love an (API|export to Excel|offline mode) in {product}.",
        "Please add (Polish|Danish|Korean) as a language to {product}.",
        "Is there a plan to connect {product} with (Slack|our CRM|Outlook)?",
        "I wish {product} could (schedule reports|merge contacts|group tasks by week).",
        "A way to (pin|tag|archive) items in {product} would help us.",
        "(Suggestion|An idea): let {product} send a weekly summary to {mail}.",
        "{product} should allow (custom fields|more than five columns|larger fonts).",
        "Do you intend to bring {product} to (tablets|Linux|smart watches)?",
        "My wish for the next {product} release: templates that a team can share.",
        "Have you thought about a voice input for {product}?",
    ),
    "cancel": (
        "We want to (cancel|end|stop) our {product} subscription.",
        "Please (close|delete) my {product} account {mail}.",
        "How do I (cancel|terminate) {product} before it renews?",
        "We are (moving|switching) to another vendor and will not renew {product}.",
        "Delete all data you hold on {mail} in {product}, we are leaving.",
        "The {product} trial is not for us, please (end|cancel) it.",
        "I pressed cancel in {product} but the plan is still active for {mail}.",
        "Our contract for {product} ends soon, please do not (extend|renew) it.",
        "(Take|Please take) us off the {product} plan, the project is over.",
        "I no longer need {product}, what is the notice period?",
        "Consider this our notice: we give up {product} and the user {mail}.",
        "The office shuts, so the {product} licences should run out for good.",
    ),
}
IMPACTS: dict[str, tuple[str, ...]] = {
    "urgent": (
        "The whole company is (down|stuck|at a standstill).",
        "Everyone is affected and we lose (sales|orders|customers) right now.",
        "Production has stopped, we need help (immediately|right away).",
        "This is an emergency, all our (shops|sites|teams) are hit.",
        "Nothing works for anybody, please call at once.",
        "We lose money every (minute|second).",
        "All (forty|sixty|ninety) of us are blocked right now.",
        "Our customers can't be served at all, act now.",
        "(Emergency|Urgent): every department is down.",
        "Please call immediately, the entire (office|factory) has stopped.",
        "The whole team is stuck and we need help right now.",
        "This is urgent, everybody is blocked and customers are leaving.",
    ),
    "high": (
        "I can't (work|continue) until this is solved.",
        "I need it (today|by tonight|before noon).",
        "We have a deadline (tomorrow|this evening).",
        "It blocks my (work|whole day), please hurry.",
        "There is a client meeting this afternoon that depends on it.",
        "Please treat this as important, payroll is due tomorrow.",
        "(Two|Three|Four) colleagues are waiting for this today.",
        "It has to be solved before tomorrow morning.",
        "Please hurry, my (talk|audit) is tomorrow.",
        "I am blocked, an answer today is important.",
        "Please hurry, I need this before tomorrow.",
        "My deadline is today and I can't continue.",
    ),
    "normal": (
        "There is a workaround, but it is (annoying|slow).",
        "An answer this week would be (fine|good).",
        "It happens now and then.",
        "I can still work, though it (bothers|slows) me.",
        "Please look into it in the next few days.",
        "It is a bit of a nuisance.",
        "We manage for the moment.",
        "Please deal with it in the usual order.",
        "Some time this week is (soon enough|fine).",
        "It is annoying, but we have a workaround.",
        "We can still work, please look into it this week.",
        "It is a nuisance now and then, but we manage.",
    ),
    "low": (
        "No (rush|hurry) at all.",
        "Whenever you have time.",
        "Just (curious|asking).",
        "It can wait until next (month|quarter|year).",
        "Not important, only for your information.",
        "This has no deadline.",
        "Take your time.",
        "It is a very minor point.",
        "There is no (rush|hurry), it can wait.",
        "I am only asking, take all the time you like.",
        "No hurry, this can wait for months.",
        "Only a minor point, whenever you have time for it.",
    ),
}
GREETINGS = ("Hi,", "Hello,", "Dear team,", "Good morning,", "Hey,", "Hi there,", "To support:", "", "", "")
CLOSINGS = ("Thanks, {name}", "Best, {name}", "{name}", "Regards, {name}", "Thank you", "", "", "")
NAMES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Ada", "Ben", "Carla", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas",
        "Kira", "Leo", "Maya", "Nils", "Olga", "Pablo", "Rosa", "Sami", "Tara", "Viktor",
    ),
    "holdout": ("Amir", "Bella", "Cyril", "Dora", "Emil", "Freya", "Gino", "Hanna", "Ivan", "Julia", "Karim"),
}  # fmt: skip
DOMAINS: dict[Split, tuple[str, ...]] = {
    "train": ("acme.com", "north.io", "bluebay.net", "kiosk.org", "redfox.com", "solis.net", "umbra.org"),
    "holdout": ("quarry.com", "delta9.io", "mapleco.net", "verano.org"),
}
CHOICE = re.compile(r"\(([^()|]*(?:\|[^()|]*)+)\)")
PLACE = re.compile(r"\{(invoice|error|order|mail)\}")


def tickets(split: Split, count: int, seed: int) -> Iterator[dict[str, object]]:
    """`count` different conversations of one split, as `{"messages": [system, user, assistant]}`."""
    draw = random.Random(f"{split} {seed}")  # noqa: S311 - reproducible on purpose
    texts: set[str] = set()
    while len(texts) < count:
        text, answer = _ticket(split, draw)
        if text not in texts:
            texts.add(text)
            turns = (("system", SYSTEM), ("user", text), ("assistant", answer))
            yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(folder: Path, train: int, holdout: int, seed: int) -> tuple[Path, Path]:
    """Write both files into `folder` and return their paths; the same arguments give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[Split, int] = {"train": train, "holdout": holdout}
    paths: dict[Split, Path] = {split: folder / f"tickets-{split}.jsonl" for split in sizes}
    for split, count in sizes.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in tickets(split, count, seed)]
        paths[split].write_text("".join(lines), encoding="utf-8")
    return paths["train"], paths["holdout"]


def _ticket(split: Split, draw: random.Random) -> tuple[str, str]:
    category, priority = draw.choice(tuple(PROBLEMS)), draw.choice(tuple(IMPACTS))
    problem, impact = _sentences(split, category, priority, draw)
    product, name = draw.choice(PRODUCTS), draw.choice(NAMES[split])
    entities: list[str] = []

    def fill(place: re.Match[str]) -> str:
        entities.append(_entity(place[1], split, name, draw))
        return entities[-1]

    body = [_choose(problem, draw), _choose(impact, draw)]
    parts = [draw.choice(GREETINGS), *body, draw.choice(CLOSINGS).replace("{name}", name)]
    text = PLACE.sub(fill, " ".join(part for part in parts if part).replace("{product}", product))
    answer = {"category": category, "priority": priority, "product": product, "entities": entities}
    return text, json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


def _sentences(split: Split, category: str, priority: str, draw: random.Random) -> tuple[str, str]:
    """A problem and an impact sentence whose pair belongs to this split."""
    problems, impacts = PROBLEMS[category], IMPACTS[priority]
    while True:
        i, j = draw.randrange(len(problems)), draw.randrange(len(impacts))
        is_reserved = i >= len(problems) - RESERVED or j >= len(impacts) - RESERVED
        if (is_reserved or (i + j) % 4 == 0) == (split == "holdout"):
            return problems[i], impacts[j]


def _choose(sentence: str, draw: random.Random) -> str:
    return CHOICE.sub(lambda choice: draw.choice(choice[1].split("|")), sentence)


def _entity(kind: str, split: Split, name: str, draw: random.Random) -> str:
    """A mail address or a code; a code's number is divisible by 4 in the holdout alone."""
    if kind == "mail":
        return f"{name.lower()}@{draw.choice(DOMAINS[split])}"
    number = draw.randrange(100, 1000)
    while (number % 4 == 0) != (split == "holdout"):
        number = draw.randrange(100, 1000)
    return {"invoice": "INV-", "error": "E", "order": "ORD-"}[kind] + str(number)


def main() -> None:
    """Write the two files and say where they are."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.data.demo_tickets", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=800, help="training tickets (default: 800)")
    parser.add_argument("--holdout", type=int, default=240, help="held-out tickets (default: 240)")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    for path in write(options.folder, options.train, options.holdout, options.seed):
        print(path)


if __name__ == "__main__":
    main()
