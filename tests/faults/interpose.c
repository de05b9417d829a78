/* Stands between a program and its file system: counts what changes files below one folder, kills the process at the
 * Nth such event, or sends it another signal, or sets its clock, or lets the disk be full after so many bytes, or holds
 * the process at every event so that somebody looks at the folder.
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
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static struct {
    long events, kill_at;
    int number, times; /* the signal, and at how many events from kill_at on */
    long long step;    /* seconds by which the clock on the wall is wrong from kill_at on; no signal then */
    long long room, written; /* bytes of the disk, negative: no limit */
    int holding;       /* whether processes are held at every event */
    sem_t held, go;
    pthread_mutex_t turn; /* one is held at a time */
    long peeks;
    char root[PATH_MAX], dead[64];
} *state;

__attribute__((constructor)) static void begin(void) {
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    state->kill_at = -1;
    state->room = -1;
    sem_init(&state->held, 1, 0);
    sem_init(&state->go, 1, 0);
    pthread_mutexattr_t shared;
    pthread_mutexattr_init(&shared);
    pthread_mutexattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&state->turn, &shared);
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
    state->holding = 0;
    state->dead[0] = 0;
    state->peeks = 0;
}

/* From now on hold every process at each event, and in the middle of each write, until `go`. */
void hold(void) { state->holding = 1; }

/* Count from now on the files below the root that are opened for reading and whose path has `dead` in it. */
void count_peeks(const char *dead) { snprintf(state->dead, sizeof state->dead, "%s", dead); }

/* Whether a process is held; waits for so many milliseconds. */
int is_held(int milliseconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    long long nanoseconds = until.tv_nsec + milliseconds * 1000000LL;
    until.tv_sec += nanoseconds / 1000000000, until.tv_nsec = nanoseconds % 1000000000;
    return sem_timedwait(&state->held, &until) == 0;
}

void go(void) { sem_post(&state->go); }

long events(void) { return state->events; }
long long written(void) { return state->written; }
long peeks(void) { return state->peeks; }

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

/* Whoever looks at the folder finds it as a kill at this moment would leave it. */
static void be_held(void) {
    if (!state->holding) return;
    pthread_mutex_lock(&state->turn);
    sem_post(&state->held);
    while (sem_wait(&state->go) && errno == EINTR);
    pthread_mutex_unlock(&state->turn);
}

/* Counts an event; true where the process is to die in it. Gentler signals are sent here. */
static int due(void) {
    long past = __sync_add_and_fetch(&state->events, 1) - state->kill_at;
    be_held();
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

/* Takes note of what was opened to be read, where it is a file of a name that is counted. */
static int peeked(int fd, int flags) {
    char link[64], target[PATH_MAX];
    struct stat status;
    if (!state || !state->dead[0] || fd < 0 || changes(flags) || !fd_below(fd)) return fd;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    target[length < 0 ? 0 : length] = 0;
    if (strstr(target, state->dead) && !fstat(fd, &status) && S_ISREG(status.st_mode))
        __sync_add_and_fetch(&state->peeks, 1);
    return fd;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (changes(flags) && at_below(AT_FDCWD, path)) event(); \
        return peeked(real(path, flags, mode), flags); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (changes(flags) && at_below(fd, path)) event(); \
        return peeked(real(fd, path, flags, mode), flags); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        int writing = strpbrk(mode, "wa+") != NULL; \
        if (writing && at_below(AT_FDCWD, path)) event(); \
        FILE *file = real(path, mode); \
        if (file) peeked(fileno(file), writing ? O_WRONLY : O_RDONLY); \
        return file; \
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

/* A write of `size` bytes by `DO(from, count)`, which counts, is torn by a kill, and ends where the disk is full. Held, it
 * is done in two halves, and seen between them. */
#define WRITE(size, DO) \
    if (due()) { \
        DO(0, (size) / 2); \
        kill(getpid(), SIGKILL), pause(); \
    } \
    ssize_t room = granted(size), half = 0; \
    if (room < 0) return -1; \
    if (state->holding && size > 1) { \
        half = DO(0, (size) / 2); \
        if (half < 0) return half; \
        be_held(); \
    } \
    ssize_t done = DO(half, room - half); \
    if (done < 0) return done; \
    state->written += half + done; \
    return half + done;

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write);
    if (!fd_below(fd)) return real(fd, bytes, size);
#define TO_WRITE(from, count) real(fd, (const char *)bytes + (from), count)
    WRITE(size, TO_WRITE)
}

#define TO_PWRITE(from, count) real(fd, (const char *)bytes + (from), count, offset + (from))
#define PWRITE(name, type) \
    ssize_t name(int fd, const void *bytes, size_t size, type offset) { \
        REAL(name); \
        if (!fd_below(fd)) return real(fd, bytes, size, offset); \
        WRITE(size, TO_PWRITE) \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

/* Copies of whole files: what is asked for is often more than there is, so half of it is half of the file. */
#define TO_SEND(from, count) real(fd, source, offset, count)
#define SENDFILE(name, type) \
    ssize_t name(int fd, int source, type *offset, size_t size) { \
        REAL(name); \
        if (!fd_below(fd)) return real(fd, source, offset, size); \
        struct stat status; \
        off_t at = offset ? (off_t)*offset : lseek(source, 0, SEEK_CUR); \
        if (!fstat(source, &status) && S_ISREG(status.st_mode)) { \
            if (at >= status.st_size) return 0; \
            if ((off_t)size > status.st_size - at) size = status.st_size - at; \
        } \
        WRITE(size, TO_SEND) \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

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

/* Buffered writes, which end in the C library's own write: gguflib's. Nothing of them is on the disk until then. */
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
    size_t half = 0;
    if (state->holding) {
        half = real(bytes, 1, size * count / 2, file);
        fflush(file);
        be_held();
    }
    size_t done = half + real((const char *)bytes + half, 1, room - half, file);
    state->written += done;
    return done / size;
}
