"""The order of a drop's log against real time: what had been answered when an operation began came before (I12, I15).

One sweep over the instants at which operations began and ended. `seen` is the newest `seq` that anybody had been told
by then: a change that begins now gets a higher one, a refusal or a look says this one or a later one. So nothing is
seen before its operation began, either: who saw it ended too early.

Instants that are equal say nothing of the order: two operations that touch count as concurrent.
"""

from operator import itemgetter

from tests.proof.effects import Made
from tests.proof.history import Delivery, Operation
from tests.proof.model import DropModel
from tests.proof.violation import Findings

Read = tuple[int, int, Operation]
"""When an operation that changed nothing began (µs), the `seq` at which its answer is true, and itself."""
Sight = tuple[int, int, bool, Operation | Delivery]
"""When somebody was told of a `seq` (µs), which, and whether a decision rests on it; by what."""


def check_order(
    model: DropModel, made: list[Made], reads: list[Read], sights: list[Sight], may_read_stale: bool, found: Findings
) -> None:
    """`made`: by clients alone. With `may_read_stale` a superseded engine may refuse and show what it last knew."""
    begins = [(began, seq, True, operation) for began, seq, operation in made]
    begins += [(began, seq, False, operation) for began, seq, operation in reads]
    began_at = itemgetter(0)
    begins.sort(key=began_at)
    sights.sort(key=began_at)
    epochs, drop_id = model.epochs, model.drop_id
    # `noticed`: by anybody, by an answer that decided nothing too.
    seen = noticed = seen_epoch = 0
    seen_by: Operation | Delivery | None = None
    noticed_by: Operation | Delivery | None = None
    told_under: dict[int, int] = {}  # the newest `seq` that was told under each epoch
    position, count = 0, len(sights)
    for began, seq, is_change, operation in begins:
        while position < count and sights[position][0] < began:
            _, told, is_decided, by = sights[position]
            position += 1
            if told > noticed:
                noticed, noticed_by = told, by
            if is_decided:
                if told > seen:
                    seen, seen_by = told, by
                    if epochs[told] > seen_epoch:
                        seen_epoch = epochs[told]
                under = by.epoch if type(by) is Operation and by.epoch is not None else epochs[told]
                told_under[under] = max(told, told_under.get(under, 0))
                if under > seen_epoch:
                    seen_epoch = under
        if is_change:
            if seq <= noticed:
                sentence = (
                    f"{_name(noticed_by)} had told of seq {noticed} before #{operation.number} began, which made {seq}"
                )
                invariant = "I11" if isinstance(noticed_by, Delivery) else "I12"
                found.add(invariant, sentence, drop_id, operation, *_operations(noticed_by), seq=seq)
            if epochs[seq] < seen_epoch:
                sentence = f"epoch {epochs[seq]} made seq {seq} when epoch {seen_epoch} was known already"
                found.add("I15", sentence, drop_id, operation, seq=seq)
            continue
        epoch = operation.epoch
        newest = seen
        if may_read_stale:
            # Of what only its successor told it knows nothing, were it its own: that may be in doubt for it still.
            known = (told for under, told in told_under.items() if epoch is not None and under <= epoch)
            newest = max(known, default=0)
        elif epoch is not None and epoch < seen_epoch and not operation.is_replayed:
            sentence = f"answered under epoch {epoch} when epoch {seen_epoch} was known already"
            found.add("I15", sentence, drop_id, operation)
        if seq < newest:
            sentence = f"a stale answer: true at seq {seq}, and {_name(seen_by)} had told of {seen} before it began"
            found.add("I12", sentence, drop_id, operation, *_operations(seen_by), seq=seq)


def check_epoch(operation: Operation, seq: int, model: DropModel, is_decided: bool, found: Findings) -> None:
    """An answer's epoch is not newer than the drop's last; nor older than that of the change on which it rests."""
    epoch = operation.epoch
    if epoch is None:
        return
    if is_decided and epoch < model.epochs[seq]:
        sentence = f"epoch {epoch} speaks of seq {seq}, which epoch {model.epochs[seq]} made"
        found.add("I15", sentence, model.drop_id, operation)
    if model.row is not None and epoch > model.row.epoch:
        found.add("I15", f"epoch {epoch}, the drop's last is {model.row.epoch}", model.drop_id, operation)


def _name(by: Operation | Delivery | None) -> str:
    if isinstance(by, Operation):
        return f"#{by.number}"
    return "nobody" if by is None else f"viewer {by.viewer}'s feed"


def _operations(by: Operation | Delivery | None) -> tuple[Operation, ...]:
    return (by,) if isinstance(by, Operation) else ()
