"""Chooses how the packs of a training run, once its callbacks have begun; changes it if that turns out not to work."""

from qwhisper.engine.compiled import why_not_compiled
from qwhisper.report.kinds import Executes, Prepared
from qwhisper.train.fit import wanted_execution
from qwhisper.train.session import Session


def choose_execution(session: Session) -> None:
    """Follow --execution, or what a resumed run did before, if it is possible here."""
    wanted = wanted_execution(session.args, session.total_steps, session.state.execution)
    why = None if wanted == "plain" else session.executor.why_plain() or why_not_compiled()
    session.executor.execute(wanted if why is None else "plain")
    session.state.execution = session.executor.execution
    if session.args.execution != "auto" or session.executor.device.type != "cpu":
        session.report(Executes(execution=session.executor.execution, why=why))


def heed_changes(session: Session) -> None:
    """Call before a step. A callback may have changed the model: graphs of it are dropped, or packs run plain."""
    if session.executor.execution == "plain" or not session.hooks.callbacks or not session.executor.has_changed():
        return
    if (why := session.executor.why_plain()) is not None:
        run_plain(session, why)
    else:
        session.executor.free_graphs()


def run_plain(session: Session, why: str) -> None:
    """From here on, in this run and after a resume."""
    session.executor.execute("plain")
    session.state.execution = "plain"
    session.report(Executes(execution="plain", why=why))


def report_preparation(session: Session) -> None:
    """Report passes that were compiled or recorded since the last call."""
    passes, seconds = session.executor.take_preparation()
    if passes:
        session.report(Prepared(passes=passes, seconds=round(seconds, 3)))
