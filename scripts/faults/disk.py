"""A disk that keeps what POSIX promises and no more: what may be on it after a power loss, from a log of system calls.

The rules. A file's bytes are safe after fsync of the file; until then each part written since may be missing: the file is
as it was, or cut at any multiple of 4 KiB, or as long as it should be but filled with zeros. A name is safe after fsync of
its folder; until then every creation, renaming and removal may have reached the disk or not, in any order, but each one whole.
A file's fsync does not make its name safe.
"""
import itertools
import os

PAGE = 4096
# Changes of names in one folder up to which all subsets are tried; above, prefixes and all but one.
SMALL = 5
# Combinations of the folders' subsets up to which all are tried; above, one folder varies and the others keep all or nothing.
MOST = 256
O_CREAT, O_TRUNC, EXCHANGE = 0o100, 0o1000, 2


class File:
    """Bytes as programs see them, and as the disk has them; None: the disk knows nothing of the file yet."""

    def __init__(self):
        self.data, self.safe = bytearray(), None


class Folder:
    """Names as programs see them, as the disk has them, and the changes between: each is a list of (name, what)."""

    def __init__(self):
        self.names, self.safe, self.waiting = {}, {}, []

    def change(self, *effects):
        for name, what in effects:
            put(self.names, name, what)
        self.waiting.append(effects)


def put(names, name, what):
    if what is None:
        names.pop(name, None)
    else:
        names[name] = what


class Disk:
    """Replays a log under the folder `top`, which was on the disk, empty, before the first call."""

    def __init__(self, top):
        self.top, self.root = os.path.normpath(top), Folder()

    def place(self, path):
        """The folder that holds a path, and the name in it."""
        parts = os.path.relpath(os.path.normpath(path), self.top).split("/")
        folder = self.root
        for part in parts[:-1]:
            folder = folder.names[part]
        return folder, parts[-1]

    def find(self, path):
        if os.path.normpath(path) == self.top:
            return self.root
        folder, name = self.place(path)
        return folder.names.get(name)

    def apply(self, call):
        """Takes in one call of the log."""
        name, result, offset, flags, path, other, data = call
        if result < 0 or path.endswith(" (deleted)"):
            return
        if name in ("openat", "open", "creat"):
            self.opened(path, flags)
        elif name in ("write", "pwrite", "writev"):
            file = self.find(path)
            file.data.extend(bytes(max(0, offset - len(file.data))))
            file.data[offset : offset + len(data)] = data
        elif name in ("ftruncate", "truncate"):
            file = self.find(path)
            del file.data[offset:]
            file.data.extend(bytes(offset - len(file.data)))
        elif name == "fsync":
            self.synced(self.find(path))
        elif name == "mkdir":
            folder, last = self.place(path)
            folder.change((last, Folder()))
        elif name == "unlink":
            folder, last = self.place(path)
            folder.change((last, None))
        elif name == "link":
            folder, last = self.place(other)
            folder.change((last, self.find(path)))
        elif name == "rename":
            self.renamed(path, other, flags & EXCHANGE)
        elif name not in ("fchmod", "chmod"):
            raise ValueError(f"no rule for {name}")

    def opened(self, path, flags):
        folder, last = self.place(path)
        if flags & O_CREAT and last not in folder.names:
            folder.change((last, File()))
        elif flags & O_TRUNC:
            folder.names[last].data.clear()

    def synced(self, what):
        if isinstance(what, File):
            what.safe = bytes(what.data)
        else:
            what.safe, what.waiting = dict(what.names), []

    def renamed(self, path, other, exchange):
        (folder, last), (target, name) = self.place(path), self.place(other)
        if folder is not target:
            raise ValueError(f"renamed from one folder to another: {path}")
        moved = folder.names[last]
        folder.change((last, folder.names[name] if exchange else None), (name, moved))

    def states(self):
        """Yields what the disk may hold if the power fails now, as {path: bytes, or None for a folder}."""
        folders = list(dict.fromkeys(reachable(self.root)))
        for chosen in combinations([subsets(len(f.waiting)) for f in folders]):
            taken = dict(zip(map(id, folders), chosen))
            yield from contents(dict(walk(self.root, taken, "")))


def reachable(folder):
    """Every folder that some state can show: named now, on the disk, or by a change between."""
    yield folder
    changed = [what for effects in folder.waiting for _, what in effects]
    for what in {id(w): w for w in [*folder.names.values(), *folder.safe.values(), *changed] if isinstance(w, Folder)}.values():
        yield from reachable(what)


def subsets(count):
    """Which of `count` waiting changes may have reached the disk."""
    if count <= SMALL:
        return list(itertools.product((False, True), repeat=count))
    made = [tuple(at < cut for at in range(count)) for cut in range(count + 1)]
    made += [tuple(at != out for at in range(count)) for out in range(count)]
    return list(dict.fromkeys(made))


def combinations(choices):
    """All combinations when there are few; else one choice varies and the others are at their first or last."""
    total = 1
    for c in choices:
        total *= len(c)
    if total <= MOST:
        yield from itertools.product(*choices)
        return
    for at, own in enumerate(choices):
        for end in (0, -1):
            for choice in own:
                yield tuple(choice if i == at else c[end] for i, c in enumerate(choices))


def walk(folder, taken, path):
    """The tree that the disk has when `taken` says which changes of each folder have reached it."""
    names = dict(folder.safe)
    for kept, effects in zip(taken.get(id(folder), ()), folder.waiting):
        for name, what in effects if kept else ():
            put(names, name, what)
    for name, what in names.items():
        yield f"{path}{name}", what
        if isinstance(what, Folder):
            yield from walk(what, taken, f"{path}{name}/")


def contents(tree):
    """Yields the tree with every content of each file that may be: one file varies, the others lost or kept all."""
    choices = {path: versions(path, what) for path, what in tree.items() if isinstance(what, File)}
    seen = set()
    for at in [None, *(path for path, c in choices.items() if len(c) > 2)]:
        for end in (0, -1):
            for version in choices[at] if at else [None]:
                state = {path: None for path in tree}
                state |= {path: version if path == at else c[end] for path, c in choices.items()}
                key = tuple(state.values())
                if key not in seen:
                    seen.add(key)
                    yield state


def versions(path, file):
    """What a file may hold, the least first and all of it last."""
    safe, data = kept(file.safe or b""), kept(bytes(file.data))
    if safe == data:
        return [data]
    if path.rsplit("/", 1)[-1].endswith(".kto-tmp") or ".kto-tmp/" in path:
        return [safe, data]  # Nobody reads what is in a temporary.
    same = len(os.path.commonprefix([safe, data]))
    cuts = [kept(data[:at]) for at in range(0, len(data), PAGE) if at > same]
    return [safe, *cuts, kept(data[:same] + bytes(len(data) - same)), data]


def kept(data, pool={}):
    """The first object of these bytes: thousands of states share their files."""
    return pool.setdefault(data, data)
