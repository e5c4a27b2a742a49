"""A message on its way through a server that says 450, then 530, then 250.

Run it with `python examples/quickstart.py` (needs the extra `testing`). It starts a mail server on a free port of
127.0.0.1 which greylists for two seconds, then wants a log-in; sends a message through it; and prints what happened.
With `--plot timeline.svg` it draws the same as a picture (needs matplotlib).
"""

import argparse
import asyncio
from email.message import EmailMessage
from pathlib import Path

from smtpretry import Delivery, RetryingSMTP
from smtpretry.testing import ScriptedServer


async def main() -> Delivery:
    """Send one message, print its timeline, and return what became of it."""
    message = EmailMessage()
    message["From"] = "app@example.com"
    message["To"] = "bob@example.com"
    message["Subject"] = "Your order is on its way"
    message.set_content("It will be with you on Friday.")

    async with ScriptedServer(tls=True, auth=("app", "secret"), auth_required=False) as server:
        server.on("RCPT", "bob@*", "450 4.2.0 <bob@example.com>: Greylisted, try again in 2 seconds", times=1)
        server.on("MAIL", "250 2.1.0 Ok", times=1)
        server.on("MAIL", "530 5.7.0 Authentication required", times=1)

        async with RetryingSMTP(server.client(start_tls=False), username="app", password="secret") as smtp:
            delivery = await smtp.deliver(message)

        show(delivery)
        [received] = server.messages
        how = "over TLS" if received.tls else "in the clear"
        print(f"The server has {received.message['Subject']!r}, sent {how} by {received.authenticated!r}.")
    return delivery


def show(delivery: Delivery) -> None:
    """Print the story of a delivery: each reply that decided something, what was done about it, and the outcome."""
    for number, attempt in enumerate(delivery.attempts, 1):
        print(f"attempt {number}")
        for step in attempt.steps:
            print(f"  {delivery.elapsed(step.at):5.1f} s  {step.stage.value:12} {step.reply}")
            if step.action is not None:
                print(f"{'':24}-> {step.action.value}" + (f", wait {step.wait:g} s" if step.wait else ", at once"))
    for recipient, outcome in delivery.outcomes.items():
        print(f"{recipient}: {outcome.status.value}")


def draw(delivery: Delivery, file: Path) -> None:
    """Draw the replies over the seconds, one on a line, and the wait between them."""
    import matplotlib as mpl  # noqa: PLC0415 - the picture alone needs it
    from matplotlib.figure import Figure  # noqa: PLC0415

    colours = {"2": "#3fb950", "4": "#d29922", "5": "#f85149"}  # each stands out on white and on black
    grey, faint = "#7d8590", "#7d859040"
    steps = [step for attempt in delivery.attempts for step in attempt.steps]
    times = [delivery.elapsed(step.at) for step in steps]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "smtpretry", "font.size": 10, "text.color": grey}):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        axes = figure.subplots()
        for row, (step, at) in enumerate(zip(steps, times, strict=True)):
            said = f"{step.reply.code} {step.reply.text.partition(': ')[2] or step.reply.text}"
            done = f" → {step.action.value}" if step.action else ""
            done += f" after {step.wait:g} s" if step.wait else ""
            left = at > max(times) / 2
            if step.wait:
                axes.plot([at, at + step.wait], [row, row], color=faint, linewidth=6, solid_capstyle="butt")
            axes.plot(at, row, "o", color=colours[str(step.reply.code)[0]], markersize=9, clip_on=False)
            place = {"xytext": (-10 if left else 10, 11 if step.wait else 0), "ha": "right" if left else "left"}
            axes.annotate(said + done, (at, row), textcoords="offset points", va="center", **place)
        axes.set_title("One message to bob@example.com, one send call", loc="left")
        axes.set_yticks(range(len(steps)), [step.stage.value for step in steps], color=grey)
        axes.set_xlabel("seconds since the call", color=grey)
        axes.locator_params(axis="x", nbins=5)
        axes.set(xlim=(0, max(times) * 1.05), ylim=(len(steps) - 0.5, -0.7))
        axes.tick_params(colors=grey, left=False)
        axes.grid(axis="x", color=faint)
        axes.spines[["left", "top", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(faint)
        figure.savefig(file, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send one message through a server that greylists.")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timeline there, as SVG or PNG")
    options = parser.parse_args()
    story = asyncio.run(main())
    if options.plot:
        draw(story, options.plot)
