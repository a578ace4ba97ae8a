/* Lets the n-th system call of a class fail, kills the process at it, or records all of them.
 *
 * Loaded with LD_PRELOAD by the scripts of this folder. The calls are caught by a seccomp filter that traps them into a
 * handler of this library, not by wrapping libc's functions: Rust programs also call the kernel directly (renameat2).
 * Needs no rights and no ptrace; Linux on x86-64 or aarch64.
 *
 *   FAIL_NTH_CLASSES   open,reopen,write,fsync,rename,truncate,link,mkdir,unlink,chmod
 *                      (open: to write; reopen: to read)
 *   FAIL_NTH_UNDER     only calls on paths that begin with this text count
 *   FAIL_NTH_N         which call of these; 0 or nothing: none
 *   FAIL_NTH_DO        an error number, or "kill": SIGKILL before the call
 *   FAIL_NTH_MORE      half: a write first does half of its work; from: all later calls fail too, as on a full disk
 *   FAIL_NTH_REPORT    file that gets a line when the call was reached
 *   FAIL_NTH_LOG       file that gets every call: a line of tab-separated fields, after a write also its bytes
 *
 * cc -shared -fPIC -O2 -o fail_nth.so fail_nth.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

/* The sixth argument of our own calls; the filter lets them pass. No caught call has six. */
#define MAGIC 0x6661696c6e746821L

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
static long call(long nr, long a, long b, long c, long d, long e) {
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = MAGIC;
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
  return result;
}
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
static long call(long nr, long a, long b, long c, long d, long e) {
  register long x8 __asm__("x8") = nr;
  register long x0 __asm__("x0") = a;
  register long x1 __asm__("x1") = b;
  register long x2 __asm__("x2") = c;
  register long x3 __asm__("x3") = d;
  register long x4 __asm__("x4") = e;
  register long x5 __asm__("x5") = MAGIC;
  __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
  return x0;
}
#else
#error "x86-64 or aarch64"
#endif

enum { OPEN = 1, REOPEN = 2, WRITE = 4, FSYNC = 8, RENAME = 16, TRUNCATE = 32, MKDIR = 64, UNLINK = 128, CHMOD = 256, LINK = 512 };
static const char *const CLASSES[] = {"open", "reopen", "write", "fsync", "rename", "truncate", "mkdir", "unlink", "chmod", "link"};

/* Where a call has its paths: a descriptor, a path, a folder's descriptor and a path, or two of one kind. NONE: the kernel
 * shall not have this call, so that copies are made by write, which is caught. */
enum { FD, PATH, AT, PATHS, ATS, NONE };

static const struct { long nr; const char *name; int class, form; } CALLS[] = {
    {SYS_openat, "openat", OPEN | REOPEN, AT},   {SYS_write, "write", WRITE, FD},
    {SYS_pwrite64, "pwrite", WRITE, FD},         {SYS_writev, "writev", WRITE, FD},
    {SYS_fsync, "fsync", FSYNC, FD},             {SYS_fdatasync, "fsync", FSYNC, FD},
    {SYS_renameat2, "rename", RENAME, ATS},      {SYS_ftruncate, "ftruncate", TRUNCATE, FD},
    {SYS_truncate, "truncate", TRUNCATE, PATH},  {SYS_fallocate, "fallocate", TRUNCATE, FD},
    {SYS_mkdirat, "mkdir", MKDIR, AT},           {SYS_unlinkat, "unlink", UNLINK, AT},
    {SYS_fchmod, "fchmod", CHMOD, FD},           {SYS_fchmodat, "chmod", CHMOD, AT},
    {SYS_linkat, "link", LINK, ATS},             {SYS_copy_file_range, "", 0, NONE},
    {SYS_sendfile, "", 0, NONE},                 {SYS_splice, "", 0, NONE},
#ifdef SYS_open
    {SYS_open, "open", OPEN | REOPEN, PATH},     {SYS_creat, "creat", OPEN, PATH},
    {SYS_rename, "rename", RENAME, PATHS},       {SYS_mkdir, "mkdir", MKDIR, PATH},
    {SYS_unlink, "unlink", UNLINK, PATH},        {SYS_rmdir, "unlink", UNLINK, PATH},
    {SYS_chmod, "chmod", CHMOD, PATH},           {SYS_link, "link", LINK, PATHS},
#endif
#ifdef SYS_renameat
    {SYS_renameat, "rename", RENAME, ATS},
#endif
};
enum { COUNT = sizeof CALLS / sizeof *CALLS };

static int wanted, half, from, deadly, number, target, log_fd = -1, busy;
static long reached;
static const char *under, *report;

/* A caught call with its paths as the kernel sees them. */
struct caught { int at, class; long args[5]; char path[PATH_MAX + 256], other[PATH_MAX + 256]; };

static void name_of(long fd, char *out, size_t size) {
  char link[64] = "/proc/self/cwd";
  if ((int)fd != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", (int)fd);
  long n = call(SYS_readlinkat, AT_FDCWD, (long)link, (long)out, (long)size - 1, 0);
  out[n > 0 ? n : 0] = 0;
}

static void resolve(long folder, const char *path, char *out, size_t size) {
  size_t n = 0;
  if (path[0] != '/') {
    name_of(folder, out, size);
    n = strlen(out);
    if (n + 1 < size) out[n++] = '/';
  }
  snprintf(out + n, size - n, "%s", path);
}

static void locate(struct caught *c) {
  long *a = c->args, here = AT_FDCWD;
  switch (CALLS[c->at].form) {
  case FD: name_of(a[0], c->path, sizeof c->path); break;
  case PATH: resolve(here, (char *)a[0], c->path, sizeof c->path); break;
  case AT: resolve(a[0], (char *)a[1], c->path, sizeof c->path); break;
  case PATHS: resolve(here, (char *)a[1], c->other, sizeof c->other), resolve(here, (char *)a[0], c->path, sizeof c->path); break;
  case ATS: resolve(a[2], (char *)a[3], c->other, sizeof c->other), resolve(a[0], (char *)a[1], c->path, sizeof c->path); break;
  }
}

/* The flags that a reader of the log needs: of an open, an unlink or a rename. */
static long flags_of(const struct caught *c) {
  switch (CALLS[c->at].nr) {
  case SYS_openat: case SYS_unlinkat: return c->args[2];
  case SYS_renameat2: return c->args[4];
#ifdef SYS_open
  case SYS_open: return c->args[1];
  case SYS_creat: return O_CREAT | O_TRUNC | O_WRONLY;
  case SYS_rmdir: return AT_REMOVEDIR;
#endif
  }
  return 0;
}

static long done(const struct caught *c) {
  const long *a = c->args;
  return call(CALLS[c->at].nr, a[0], a[1], a[2], a[3], a[4]);
}

static void put(long fd, const void *bytes, size_t size) {
  for (size_t at = 0; at < size;) {
    long n = call(SYS_write, fd, (long)bytes + (long)at, (long)(size - at), 0, 0);
    if (n <= 0) return;
    at += (size_t)n;
  }
}

/* Does the call and records it; one thread at a time, so that the order is the true one. */
static long logged(const struct caught *c) {
  char line[3 * PATH_MAX];
  long nr = CALLS[c->at].nr, offset = 0, bytes = 0;
  while (__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE)) call(SYS_sched_yield, 0, 0, 0, 0, 0);
  if (nr == SYS_write || nr == SYS_writev) offset = call(SYS_lseek, c->args[0], 0, SEEK_CUR, 0, 0);
  if (nr == SYS_pwrite64) offset = c->args[3];
  if (nr == SYS_ftruncate || nr == SYS_truncate) offset = c->args[1];
  long result = done(c);
  if (c->class == WRITE && result > 0) bytes = result;
  int n = snprintf(line, sizeof line, "%s\t%ld\t%ld\t%ld\t%ld\t%s\t%s\n", CALLS[c->at].name, result, offset, bytes, flags_of(c), c->path, c->other);
  put(log_fd, line, (size_t)n);
  if (nr == SYS_writev) {
    const struct iovec *parts = (const struct iovec *)c->args[1];
    for (long i = 0, left = bytes; left > 0; left -= (long)parts[i].iov_len, i++)
      put(log_fd, parts[i].iov_base, (long)parts[i].iov_len < left ? parts[i].iov_len : (size_t)left);
  } else if (bytes > 0) {
    put(log_fd, (const void *)c->args[1], (size_t)bytes);
  }
  __atomic_clear(&busy, __ATOMIC_RELEASE);
  return result;
}

static void tell(const struct caught *c) {
  char line[3 * PATH_MAX];
  long fd = report ? call(SYS_openat, AT_FDCWD, (long)report, O_WRONLY | O_CREAT | O_APPEND, 0644, 0) : -1;
  if (fd < 0) return;
  int n = snprintf(line, sizeof line, "%s %s %s\n", CALLS[c->at].name, c->path, c->other);
  put(fd, line, (size_t)n);
  call(SYS_close, fd, 0, 0, 0, 0);
}

/* Does half of a write; returns what a write returns, or 0 when there is no half. */
static long half_of(const struct caught *c) {
  long nr = CALLS[c->at].nr, part = c->args[2] / 2;
  if (!half || (nr != SYS_write && nr != SYS_pwrite64) || part == 0) return 0;
  return call(nr, c->args[0], c->args[1], part, c->args[3], 0);
}

static long serve(struct caught *c) {
  if (CALLS[c->at].form == NONE) return -ENOSYS;
  c->class = CALLS[c->at].class;
  if (c->class == (OPEN | REOPEN)) c->class = flags_of(c) & (O_WRONLY | O_RDWR | O_CREAT) ? OPEN : REOPEN;
  if (!(c->class & wanted)) return done(c);
  locate(c);
  size_t n = strlen(under);
  if (strncmp(c->path, under, n) && strncmp(c->other, under, n)) return done(c);
  if (log_fd >= 0) return logged(c);
  long at = __atomic_add_fetch(&reached, 1, __ATOMIC_RELAXED);
  if (target <= 0 || at < target || (at > target && !from)) return done(c);
  if (at == target) {
    tell(c);
    long result = half_of(c);
    if (deadly) call(SYS_kill, call(SYS_getpid, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0);
    if (result) return result;
  }
  return -number;
}

static void on_trap(int signal, siginfo_t *info, void *context) {
  ucontext_t *u = context;
  struct caught c = {.at = 0};
  (void)signal;
  while (c.at < COUNT && CALLS[c.at].nr != info->si_syscall) c.at++;
#if defined(__x86_64__)
  const int where[] = {REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8};
  for (int i = 0; i < 5; i++) c.args[i] = u->uc_mcontext.gregs[where[i]];
  u->uc_mcontext.gregs[REG_RAX] = c.at < COUNT ? serve(&c) : -ENOSYS;
#else
  for (int i = 0; i < 5; i++) c.args[i] = (long)u->uc_mcontext.regs[i];
  u->uc_mcontext.regs[0] = (unsigned long)(c.at < COUNT ? serve(&c) : -ENOSYS);
#endif
}

static int filter(void) {
  struct sock_filter code[COUNT + 12], *p = code;
  *p++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
  *p++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0);
  *p++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  *p++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
  for (int i = 0; i < COUNT; i++) /* over the rest of the list and one return */
    *p++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)CALLS[i].nr, (unsigned char)(COUNT - i), 0);
  *p++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  *p++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5]));
  *p++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(MAGIC & 0xffffffff), 0, 2);
  *p++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5]) + 4);
  *p++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(MAGIC >> 32), 1, 0);
  *p++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
  *p++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
  struct sock_fprog program = {.len = (unsigned short)(p - code), .filter = code};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
  return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
}

static const char *asked(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

__attribute__((constructor)) static void begin(void) {
  const char *classes = asked("FAIL_NTH_CLASSES", ""), *what = asked("FAIL_NTH_DO", "5");
  const char *more = asked("FAIL_NTH_MORE", ""), *log = asked("FAIL_NTH_LOG", NULL);
  for (size_t i = 0; i < sizeof CLASSES / sizeof *CLASSES; i++) {
    size_t n = strlen(CLASSES[i]);
    for (const char *p = classes; (p = strstr(p, CLASSES[i])); p += n) /* "open" is also in "reopen" */
      if ((p == classes || p[-1] == ',') && (p[n] == 0 || p[n] == ',')) wanted |= 1 << i;
  }
  if (!wanted) return;
  target = atoi(asked("FAIL_NTH_N", "0"));
  deadly = !strcmp(what, "kill");
  number = atoi(what);
  half = strstr(more, "half") != NULL;
  from = strstr(more, "from") != NULL || half;
  under = asked("FAIL_NTH_UNDER", "/");
  report = asked("FAIL_NTH_REPORT", NULL);
  if (log) {
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 500);
    close(fd);
  }
  struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER};
  if ((log && log_fd < 0) || sigaction(SIGSYS, &action, NULL) || filter()) {
    static const char text[] = "fail_nth: calls cannot be caught here\n";
    put(2, text, sizeof text - 1);
    _exit(99);
  }
}
