/* Stands between a program and its file system: counts what changes files below one folder, kills the process at the
 * Nth such event, or sends it another signal, or sets its clock, or lets the disk be full after so many bytes.
 *
 * Loaded by LD_PRELOAD. An event is an open for writing, a write, rename, link, unlink, mkdir, rmdir or truncation of
 * something below the folder. A write that the process is killed in is torn: half of it is done. The count lies in
 * memory that forked processes share, so that whoever started them reads it after their death.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static struct {
    long events, kill_at;
    int number, times; /* the signal, and at how many events from kill_at on */
    long long step;    /* seconds by which the clock on the wall is wrong from kill_at on; no signal then */
    long long room, written; /* bytes of the disk, negative: no limit */
    char root[PATH_MAX];
} *state;

__attribute__((constructor)) static void begin(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    state->kill_at = -1;
    state->room = -1;
}

/* Watch `root` from now on: kill at event `kill_at` (1 is the first; 0 never), writes fail after `room` bytes. Instead
 * of the kill, `times` signals `number`, one an event, or a clock that is `step` seconds off. */
void watch(const char *root, long kill_at, long long room, int number, int times, long long step) {
    snprintf(state->root, sizeof state->root, "%s", root);
    state->events = 0;
    state->written = 0;
    state->kill_at = kill_at;
    state->room = room;
    state->number = number;
    state->times = times;
    state->step = step;
}

long events(void) { return state->events; }
long long written(void) { return state->written; }

static int below(const char *path) {
    return state && state->root[0] && path && strncmp(path, state->root, strlen(state->root)) == 0;
}

static int fd_below(int fd) {
    char link[64], target[PATH_MAX];
    if (!state || !state->root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    return below(target);
}

static int at_below(int fd, const char *path) {
    if (path && path[0] == '/') return below(path);
    if (fd != AT_FDCWD) return fd_below(fd);
    char folder[PATH_MAX];
    return getcwd(folder, sizeof folder) && below(folder);
}

/* Counts an event; true where the process is to die in it. Gentler signals are sent here. */
static int due(void) {
    long past = __sync_add_and_fetch(&state->events, 1) - state->kill_at;
    if (state->kill_at < 1 || past < 0 || past >= state->times || state->step) return 0;
    if (state->number == SIGKILL) return 1;
    kill(getpid(), state->number);
    return 0;
}

static void event(void) {
    if (due()) kill(getpid(), SIGKILL), pause();
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(clock_gettime);
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME && state && state->step && state->events >= state->kill_at)
        now->tv_sec += state->step;
    return failed;
}

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (changes(flags) && at_below(AT_FDCWD, path)) event(); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (changes(flags) && at_below(fd, path)) event(); \
        return real(fd, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (strpbrk(mode, "wa+") && at_below(AT_FDCWD, path)) event(); \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define ONE(name) \
    int name(const char *path) { \
        REAL(name); \
        if (at_below(AT_FDCWD, path)) event(); \
        return real(path); \
    }
ONE(unlink)
ONE(rmdir)

#define TWO(name) \
    int name(const char *from, const char *to) { \
        REAL(name); \
        if (at_below(AT_FDCWD, to)) event(); \
        return real(from, to); \
    }
TWO(rename)
TWO(link)
TWO(symlink)

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (at_below(AT_FDCWD, path)) event();
    return real(path, mode);
}

int unlinkat(int fd, const char *path, int flags) {
    REAL(unlinkat);
    if (at_below(fd, path)) event();
    return real(fd, path, flags);
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    REAL(renameat);
    if (at_below(to_fd, to)) event();
    return real(from_fd, from, to_fd, to);
}

int linkat(int from_fd, const char *from, int to_fd, const char *to, int flags) {
    REAL(linkat);
    if (at_below(to_fd, to)) event();
    return real(from_fd, from, to_fd, to, flags);
}

#define TRUNCATE(name, type) \
    int name(const char *path, type length) { \
        REAL(name); \
        if (at_below(AT_FDCWD, path)) event(); \
        return real(path, length); \
    }
TRUNCATE(truncate, off_t)
TRUNCATE(truncate64, off64_t)

#define FTRUNCATE(name, type) \
    int name(int fd, type length) { \
        REAL(name); \
        if (fd_below(fd)) event(); \
        return real(fd, length); \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

/* Bytes of a write of `size` that the disk has room for; -1 where it is full. */
static ssize_t granted(size_t size) {
    if (state->room < 0) return size;
    long long left = state->room - state->written;
    if (left <= 0) return errno = ENOSPC, -1;
    return (long long)size < left ? (ssize_t)size : (ssize_t)left;
}

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write);
    if (!fd_below(fd)) return real(fd, bytes, size);
    if (due()) {
        real(fd, bytes, size / 2);
        kill(getpid(), SIGKILL), pause();
    }
    ssize_t room = granted(size);
    if (room < 0) return -1;
    ssize_t done = real(fd, bytes, room);
    if (done > 0) state->written += done;
    return done;
}

#define PWRITE(name, type) \
    ssize_t name(int fd, const void *bytes, size_t size, type offset) { \
        REAL(name); \
        if (!fd_below(fd)) return real(fd, bytes, size, offset); \
        if (due()) { \
            real(fd, bytes, size / 2, offset); \
            kill(getpid(), SIGKILL), pause(); \
        } \
        ssize_t room = granted(size); \
        if (room < 0) return -1; \
        ssize_t done = real(fd, bytes, room, offset); \
        if (done > 0) state->written += done; \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    if (!fd_below(fd)) return real(fd, parts, count);
    ssize_t total = 0;
    for (int part = 0; part < count; part++) { /* as writes, one after the other: each can be torn or refused */
        ssize_t done = write(fd, parts[part].iov_base, parts[part].iov_len);
        if (done < 0) return total ? total : -1;
        total += done;
        if ((size_t)done < parts[part].iov_len) break;
    }
    return total;
}

/* Buffered writes, which end in the C library's own write: gguflib's. */
size_t fwrite(const void *bytes, size_t size, size_t count, FILE *file) {
    REAL(fwrite);
    if (!size || !count || !fd_below(fileno(file))) return real(bytes, size, count, file);
    if (due()) {
        real(bytes, 1, size * count / 2, file);
        fflush(file);
        kill(getpid(), SIGKILL), pause();
    }
    ssize_t room = granted(size * count);
    if (room < 0) return 0;
    size_t done = real(bytes, 1, room, file);
    state->written += done;
    return done / size;
}
