"""The kernel's means of confinement, called through ctypes: namespaces, Landlock, seccomp, capabilities.

Called only by the files beside it, in a process of its own. Standard library only: that process has no
site-packages. Every function raises `OSError` where the kernel refuses, so the caller can name what is missing.
The seccomp program is assembled here by hand; it is thirty lines and saves a dependency with C code.

Reference: man pages unshare(2), landlock(7), seccomp(2), capabilities(7).
"""

import ctypes
import errno
import os
import platform
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000
_CLONE_NEWTIME = 0x80
_NAMESPACE_FLAGS = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
) | _CLONE_NEWTIME

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 36, 38
_SECCOMP_MODE_FILTER = 2

_MACHINE = platform.machine()
# System call numbers by machine: x86_64, aarch64. None: the machine has no such call.
_CALLS = {
    "pivot_root": (155, 41), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "capset": (126, 91),
}  # fmt: skip
# What a program under test has no business with, denied with EPERM.
_DENIED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "personality": (135, 92),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "shmctl": (31, 195), "msgctl": (71, 187), "msgsnd": (69, 189), "msgrcv": (70, 188), "semctl": (66, 191),
    "semop": (65, 193), "semtimedop": (220, 192), "mq_unlink": (241, 181), "quotactl_fd": (443, 443),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "sendmsg": (46, 211), "sendmmsg": (307, 269), "setsockopt": (54, 208),
}  # fmt: skip
# With no process namespace: a program may signal itself only, and may not leave its process group.
_SIGNALLING = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
               "rt_tgsigqueueinfo": (297, 240)}  # fmt: skip
_LEAVING = {"setsid": (112, 157), "setpgid": (109, 154)}
# Nor may it slow others down.
_SLOWING = {"setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
            "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30)}  # fmt: skip
# What Landlock lets pass: a file's mode, owner, attributes and times by its path. By a handle they stay possible.
_MARKING = {"chmod": (90, None), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
            "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
            "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15), "removexattrat": (466, 466),
            "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
            "inotify_add_watch": (254, 27)}  # fmt: skip
_UTIMENSAT = (280, 88)
# A pair of connected stream sockets, as asyncio needs one, and nothing that could be sent to anybody else.
_SOCKETPAIR, _SENDTO = (53, 199), (44, 206)
# Who gets the signals of a handle, which ones, and how much a pipe holds: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY,
# F_SETPIPE_SZ; FIOASYNC, FIOSETOWN, SIOCSPGRP, TIOCSTI.
_FCNTL, _FCNTL_DENIED = (72, 25), (8, 10, 15, 1026, 1031)
_IOCTL, _IOCTL_DENIED = (16, 29), (0x5452, 0x8901, 0x8902, 0x5412)
# Memory that is, or was, writable must not become executable; libraries are mapped from files, and read-only.
_MMAP, _MPROTECT = (9, 222), {"mprotect": (10, 226), "pkey_mprotect": (329, 288)}
_PROT_WRITE, _PROT_EXEC, _MAP_ANONYMOUS = 2, 4, 0x20
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def _number(pair: tuple[int, int | None]) -> int | None:
    if _MACHINE not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no system call table for {_MACHINE}")
    return pair[0] if _MACHINE == "x86_64" else pair[1]


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(name: str, *arguments) -> int:
    number = _number(_CALLS[name])
    return _check(_LIBC.syscall(ctypes.c_long(number), *arguments), name)


def _prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _check(_LIBC.prctl(option, *padded), f"prctl {option}")


def unshare(flags: int) -> None:
    """Leave the parent's namespaces.

    Args:
        flags: ``CLONE_NEW*`` values, or-ed.
    """
    _check(_LIBC.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Attach a file system or a folder at another place.

    Args:
        source: Device or folder.
        target: Where to.
        kind: File system.
        flags: ``MS_*`` values.
        options: The file system's own.
    """
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(_LIBC.mount(*arguments), f"mount {target}")


def unmount(target: str) -> None:
    """Detach what is mounted at a place, also while it is in use.

    Args:
        target: The place.
    """
    _check(_LIBC.umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def change_root(folder: str) -> None:
    """Make `folder`, a mount point, the root and let go of the old one.

    Args:
        folder: The new root.
    """
    os.chdir(folder)
    # The new root stacked on the old one at the same place: no empty folder is needed for the old one.
    _syscall("pivot_root", b".", b".")
    unmount(".")
    os.chdir("/")


def limit_arenas() -> None:
    """Let all threads share two heaps: by default each reserves address space of its own, which is limited."""
    _LIBC.mallopt(ctypes.c_int(-8), ctypes.c_int(2))


def die_with_parent() -> None:
    """Ask for SIGKILL when the parent ends. A change of uid undoes it, so call it after that."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends, so that none can hide."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """Make setuid programs powerless; the kernel asks for it before Landlock and seccomp."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Give up all capabilities, also those a later exec could regain."""
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # Past the kernel's last capability, or not allowed: capset below is what counts.
    header = struct.pack("Ii", 0x20080522, 0)
    _syscall("capset", header, struct.pack("6I", *[0] * 6))


def landlock_version() -> int:
    """Return the kernel's Landlock version, 0 where it is absent or switched off."""
    try:
        return _syscall("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """Allow reading below some paths and writing below others, nothing else (Landlock); also no TCP where it can.

    Args:
        readable: Files and folders to read.
        writable: Folders to read and write.
    """
    version = landlock_version()
    read, all_access = 0b1101, (1 << 13) - 1  # execute, read file, read folder; all of version 1
    read &= ~1  # Nothing needs to be executed.
    all_access |= (
        (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    )
    attributes = struct.pack("Q", all_access)
    if version >= 4:
        attributes += struct.pack("Q", 0b11)  # binding and connecting TCP
    if version >= 6:
        attributes += struct.pack("Q", 0b11)  # abstract Unix sockets and signals outside the domain
    ruleset = _syscall("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for paths, access in ((readable, read), (writable, all_access & ~1)):
            for path in paths:
                _allow_path(ruleset, path, access)
        _syscall("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow_path(ruleset: int, path: str, access: int) -> None:
    file_access = 0b110 | 1 << 14 | 1 << 15  # what makes sense for a file: write, read, truncate, ioctl
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            access &= file_access
        rule = struct.pack("=Qi", access, handle)
        _syscall("landlock_add_rule", ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(handle)


def restrict_calls(own_pid: int | None, *, may_load: bool = True, may_mark: bool = True) -> None:
    """Deny system calls that reach out of the process (seccomp): sockets, exec, mounts, other processes' memory.

    Args:
        own_pid: Given where there is no process namespace: signals then go to this process only.
        may_load: Allow mapping files as code; not where the scratch folder could hold one.
        may_mark: Allow changing modes and times by path; not where the user owns files outside.
    """
    program = _assemble(own_pid, may_load, may_mark)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), pointer, 0, 0), "seccomp")


def _assemble(own_pid: int | None, may_load: bool, may_mark: bool) -> list[tuple[int, int, int, int]]:
    """The filter: (operation, skip if true, skip if false, value) an instruction, as linux/filter.h defines them."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, deny, absent = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number_at, arch_at, argument_at = 0, 4, 16
    program = [
        (load, 0, 0, arch_at),
        (equal, 1, 0, _AUDIT_ARCH[_MACHINE]),
        (give, 0, 0, kill),
        (load, 0, 0, number_at),
    ]
    if _MACHINE == "x86_64":
        program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # the x32 numbers would slip past the list
    denied = dict(_DENIED)
    if own_pid is not None:
        denied |= _LEAVING | _SLOWING
        for pair in _SIGNALLING.values():
            program += [(equal, 0, 4, _number(pair)), (load, 0, 0, argument_at), (equal, 1, 0, own_pid)]
            program += [(give, 0, 0, deny), (give, 0, 0, allow)]
    if not may_mark:
        denied |= _MARKING
        for pointer_at in (24, 28):  # Both halves of the path's address; none given means the handle itself.
            program += [(equal, 0, 4, _number(_UTIMENSAT)), (load, 0, 0, pointer_at), (equal, 1, 0, 0)]
            program += [(give, 0, 0, deny), (load, 0, 0, number_at)]
    for pair in denied.values():
        number = _number(pair)
        if number is not None:
            program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    # glibc falls back to clone, whose flags a filter can read; those of clone3 lie behind a pointer.
    program += [(equal, 0, 1, _number(_CLONE3)), (give, 0, 0, absent)]
    program += [(equal, 0, 4, _number(_CLONE)), (load, 0, 0, argument_at), (any_bit, 0, 1, _NAMESPACE_FLAGS)]
    program += [(give, 0, 0, deny), (give, 0, 0, allow)]
    program += _forbid_messages(load, equal, (give, 0, 0, deny), (give, 0, 0, allow))
    program += _forbid_new_code(load, equal, any_bit, (give, 0, 0, deny), (give, 0, 0, allow), may_load)
    # Limits of others, even of the same user, are none of its business.
    program += [(equal, 0, 4, _number(_PRLIMIT)), (load, 0, 0, argument_at), (equal, 1, 0, 0)]
    program += [(give, 0, 0, deny), (give, 0, 0, allow)]
    return [*program, (give, 0, 0, allow)]


def _forbid_messages(load: int, equal: int, deny: tuple, allow: tuple) -> list[tuple]:
    """The part of the filter that keeps handles from reaching others: by an address, by signals, by their size."""
    keep_bits, second_at, address_at = 0x54, 24, 48
    program = [(equal, 0, 7, _number(_SOCKETPAIR)), (load, 0, 0, 16), (equal, 0, 3, 1), (load, 0, 0, second_at)]
    program += [(keep_bits, 0, 0, 0xF), (equal, 1, 0, 1), deny, allow]
    program += [(equal, 0, 6, _number(_SENDTO)), (load, 0, 0, address_at), (equal, 0, 2, 0)]
    program += [(load, 0, 0, address_at + 4), (equal, 1, 0, 0), deny, allow]
    for pair, values in ((_FCNTL, _FCNTL_DENIED), (_IOCTL, _IOCTL_DENIED)):
        program += [(equal, 0, len(values) + 3, _number(pair)), (load, 0, 0, second_at)]
        program += [(equal, len(values) - index, 0, value) for index, value in enumerate(values)]
        program += [allow, deny]
    return program


def _forbid_new_code(load: int, equal: int, any_bit: int, deny: tuple, allow: tuple, may_load: bool) -> list[tuple]:
    """The part of the filter that keeps a program from running machine code it wrote."""
    protection_at, flags_at = 32, 40
    if not may_load:
        program = [
            (equal, 0, 4, _number(_MMAP)),
            (load, 0, 0, protection_at),
            (any_bit, 0, 1, _PROT_EXEC),
            deny,
            allow,
        ]
        return program + _forbid_protecting(load, equal, any_bit, deny, allow)
    program = [(equal, 0, 8, _number(_MMAP)), (load, 0, 0, protection_at), (any_bit, 1, 0, _PROT_EXEC), allow]
    program += [(any_bit, 2, 0, _PROT_WRITE), (load, 0, 0, flags_at), (any_bit, 0, 1, _MAP_ANONYMOUS), deny, allow]
    return program + _forbid_protecting(load, equal, any_bit, deny, allow)


def _forbid_protecting(load: int, equal: int, any_bit: int, deny: tuple, allow: tuple) -> list[tuple]:
    protection_at, program = 32, []
    for pair in _MPROTECT.values():
        program += [(equal, 0, 4, _number(pair)), (load, 0, 0, protection_at), (any_bit, 0, 1, _PROT_EXEC)]
        program += [deny, allow]
    return program
