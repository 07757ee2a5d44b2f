/* Calls to the file system that fail on purpose, or are recorded.  Preload this library into a process (LD_PRELOAD).

   It does nothing before `fault_arm` has read the environment:
     FAULT_ROOT    folder; only calls for paths below it count
     FAULT_CALLS   names of calls, separated by commas, as in `act` below: write, fsync, rename, ...
     FAULT_PATH    regular expression of a whole path relative to FAULT_ROOT; of two paths, one matches
     FAULT_NTH     number of the first matching call that fails, from 1
     FAULT_TIMES   number of calls that fail from there on
     FAULT_ERROR   errno of those calls; 0 = kill -9 this process instead
     FAULT_HALF    1 = a write writes its first half before that
     FAULT_SIGN    file that is created when the first call fails
     FAULT_TRACE   file to which every call that changes something is appended (see `record`) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))

static char root[PATH_MAX], calls[256], sign[PATH_MAX];
static regex_t pattern;
static int armed, error_number, half, trace = -1;
static long nth, times, count;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER; /* a call and its record are one event */

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

__attribute__((constructor)) void fault_arm(void) {
    snprintf(root, sizeof root, "%s", setting("FAULT_ROOT"));
    snprintf(calls, sizeof calls, ",%s,", setting("FAULT_CALLS"));
    snprintf(sign, sizeof sign, "%s", setting("FAULT_SIGN"));
    char whole[1024];
    snprintf(whole, sizeof whole, "^(%s)$", setting("FAULT_PATH"));
    if (regcomp(&pattern, whole, REG_EXTENDED | REG_NOSUB))
        abort();
    nth = atol(setting("FAULT_NTH")), times = atol(setting("FAULT_TIMES"));
    error_number = atoi(setting("FAULT_ERROR")), half = atoi(setting("FAULT_HALF"));
    count = 0;
    if (*setting("FAULT_TRACE")) {
        int file = REAL(open)(setting("FAULT_TRACE"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        trace = fcntl(file, F_DUPFD_CLOEXEC, 900); /* out of the way of the program's own numbers */
        close(file);
    }
    armed = *root != 0;
}

/* Copy the path relative to FAULT_ROOT.  Return 0 for a path outside. */
static int inside(const char *path, char *relative) {
    size_t length = strlen(root);
    if (strncmp(path, root, length) || (path[length] && path[length] != '/'))
        return 0;
    snprintf(relative, PATH_MAX, "%s", path[length] ? path + length + 1 : ".");
    return 1;
}

static int path_of(int file, char *relative) {
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = armed ? readlink(link, path, sizeof path - 1) : -1;
    errno = before;
    if (length < 0)
        return 0;
    path[length] = 0;
    return inside(path, relative);
}

static int path_at(int folder, const char *name, char *relative) {
    char path[PATH_MAX], link[64], parent[PATH_MAX];
    if (!armed)
        return 0;
    if (name[0] == '/')
        return inside(name, relative);
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, parent, sizeof parent - 1);
    if (length < 0)
        return 0;
    parent[length] = 0;
    return snprintf(path, sizeof path, "%s/%s", parent, name) < (int)sizeof path && inside(path, relative);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

/* Count a call.  Return 1 if it must fail; errno is set, unless a half write comes first. */
static int act(const char *call, const char *path, const char *other) {
    char word[32];
    snprintf(word, sizeof word, ",%s,", call);
    if (!nth || !strstr(calls, word))
        return 0;
    if (regexec(&pattern, path, 0, NULL, 0) && (!other || regexec(&pattern, other, 0, NULL, 0)))
        return 0;
    count++;
    if (count < nth || count >= nth + times)
        return 0;
    close(REAL(open)(sign, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    if (half && !strcmp(call, "write"))
        return 1; /* `put` does the rest */
    if (!error_number)
        die();
    errno = error_number;
    return 1;
}

/* Append one line "call, errno, offset, bytes, path, other path", separated by tabs, and the bytes that were written. */
static void record(const char *call, int result, long offset, size_t size, const char *path, const char *other,
                   const void *data) {
    if (trace < 0)
        return;
    char line[2 * PATH_MAX + 128];
    int before = errno;
    int length = snprintf(line, sizeof line, "%s\t%d\t%ld\t%zu\t%s\t%s\n", call, result < 0 ? errno : 0, offset,
                          data ? size : 0, path, other ? other : "");
    if (REAL(write)(trace, line, length) < 0 || (data && REAL(write)(trace, data, size) < 0))
        abort();
    errno = before;
}

#define BEGIN int state; pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state); pthread_mutex_lock(&order)
#define END pthread_mutex_unlock(&order); pthread_setcancelstate(state, NULL)

/* Calls that write into an open file.  offset < 0: at the position of the file. */
static ssize_t put(int file, const char *path, const void *data, size_t size, off_t offset) {
    BEGIN;
    int fails = act("write", path, NULL);
    size_t length = fails && half ? size / 2 : size;
    ssize_t result = -1;
    if (!fails || half) {
        int appends = REAL(fcntl)(file, F_GETFL) & O_APPEND;
        struct stat before;
        fstat(file, &before);
        off_t start = offset >= 0 ? offset : appends ? before.st_size : lseek(file, 0, SEEK_CUR);
        result = offset < 0 ? REAL(write)(file, data, length) : REAL(pwrite)(file, data, length, offset);
        record("write", result, start, result > 0 ? result : 0, path, NULL, data);
        if (fails && !error_number)
            die();
        if (fails)
            half = 0, times++; /* a short write is no error; the next one is */
    }
    END;
    return result;
}

ssize_t write(int file, const void *data, size_t size) {
    char path[PATH_MAX];
    return path_of(file, path) ? put(file, path, data, size, -1) : REAL(write)(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    char path[PATH_MAX];
    return path_of(file, path) ? put(file, path, data, size, offset) : REAL(pwrite)(file, data, size, offset);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) { return pwrite(file, data, size, offset); }

ssize_t writev(int file, const struct iovec *blocks, int number) {
    char path[PATH_MAX];
    if (!path_of(file, path))
        return REAL(writev)(file, blocks, number);
    ssize_t total = 0;
    for (int i = 0; i < number; i++) {
        ssize_t result = put(file, path, blocks[i].iov_base, blocks[i].iov_len, -1);
        if (result < 0)
            return total ? total : result;
        total += result;
    }
    return total;
}

/* Any other call: decide, do it, record it. */
#define EVENT(call, path, other, offset, expression)                                                                   \
    ({                                                                                                                 \
        BEGIN;                                                                                                         \
        __typeof__(expression) result = -1;                                                                            \
        if (!act(call, path, other)) {                                                                                 \
            result = expression;                                                                                       \
            record(call, (int)result, offset, 0, path, other, NULL);                                                   \
        }                                                                                                              \
        END;                                                                                                           \
        result;                                                                                                        \
    })

/* Reading calls are never recorded. */
#define READ(call, path, expression)                                                                                   \
    ({                                                                                                                 \
        BEGIN;                                                                                                         \
        int fails = act(call, path, NULL);                                                                             \
        END;                                                                                                           \
        fails ? -1 : (expression);                                                                                     \
    })

static int opened(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    if (!path_at(folder, name, path))
        return REAL(openat)(folder, name, flags, mode);
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT))
        return READ("open-to-read", path, REAL(openat)(folder, name, flags, mode));
    int is_new = (flags & O_CREAT) && faccessat(folder, name, F_OK, AT_SYMLINK_NOFOLLOW) < 0;
    const char *call = is_new ? "create" : flags & O_TRUNC ? "truncate" : "open";
    return EVENT(call, path, NULL, 0L, REAL(openat)(folder, name, flags, mode));
}

#define MODE(flags) ({ va_list rest; va_start(rest, flags); mode_t m = (flags) & O_CREAT ? va_arg(rest, mode_t) : 0; va_end(rest); m; })
int open(const char *name, int flags, ...) { return opened(AT_FDCWD, name, flags, MODE(flags)); }
int open64(const char *name, int flags, ...) { return opened(AT_FDCWD, name, flags, MODE(flags)); }
int openat(int folder, const char *name, int flags, ...) { return opened(folder, name, flags, MODE(flags)); }
int openat64(int folder, const char *name, int flags, ...) { return opened(folder, name, flags, MODE(flags)); }
int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

ssize_t read(int file, void *data, size_t size) {
    char path[PATH_MAX];
    return path_of(file, path) ? READ("read", path, REAL(read)(file, data, size)) : REAL(read)(file, data, size);
}

ssize_t preadv64(int file, const struct iovec *blocks, int number, off64_t offset) {
    char path[PATH_MAX];
    return path_of(file, path) ? READ("read", path, REAL(preadv64)(file, blocks, number, offset))
                               : REAL(preadv64)(file, blocks, number, offset);
}

#define SYNC(name)                                                                                                     \
    int name(int file) {                                                                                               \
        char path[PATH_MAX];                                                                                           \
        return path_of(file, path) ? EVENT("fsync", path, NULL, 0L, REAL(name)(file)) : REAL(name)(file);              \
    }
SYNC(fsync)
SYNC(fdatasync)

int ftruncate(int file, off_t size) {
    char path[PATH_MAX];
    return path_of(file, path) ? EVENT("resize", path, NULL, size, REAL(ftruncate)(file, size)) : REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

int posix_fallocate(int file, off_t start, off_t size) {
    char path[PATH_MAX];
    if (!path_of(file, path))
        return REAL(posix_fallocate)(file, start, size);
    struct stat before;
    fstat(file, &before);
    off_t end = before.st_size > start + size ? before.st_size : start + size;
    /* it returns its error */
    return EVENT("resize", path, NULL, end, -(errno = REAL(posix_fallocate)(file, start, size))) ? errno : 0;
}
int posix_fallocate64(int file, off64_t start, off64_t size) { return posix_fallocate(file, start, size); }

/* Copies within the kernel. The record needs the bytes, so they are read and written here. */
static ssize_t copied(int source, off_t *from, int target, const char *path, off_t *to, size_t size) {
    static __thread char block[1 << 16];
    ssize_t length = pread(source, block, size < sizeof block ? size : sizeof block, from ? *from : lseek(source, 0, SEEK_CUR));
    if (length <= 0)
        return length;
    ssize_t result = put(target, path, block, length, to ? *to : -1);
    if (result > 0) {
        if (from)
            *from += result;
        else
            lseek(source, result, SEEK_CUR);
        if (to)
            *to += result;
    }
    return result;
}

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t size, unsigned flags) {
    char path[PATH_MAX];
    return path_of(target, path) ? copied(source, from, target, path, to, size)
                                 : REAL(copy_file_range)(source, from, target, to, size, flags);
}

ssize_t sendfile(int target, int source, off_t *from, size_t size) {
    char path[PATH_MAX];
    return path_of(target, path) ? copied(source, from, target, path, NULL, size)
                                 : ((__typeof__(&sendfile))real("sendfile"))(target, source, from, size);
}
ssize_t sendfile64(int target, int source, off64_t *from, size_t size) { return sendfile(target, source, from, size); }

#define ONE_PATH(call, folder, name, expression)                                                                       \
    char path[PATH_MAX];                                                                                               \
    return path_at(folder, name, path) ? EVENT(call, path, NULL, 0L, expression) : (expression)
int unlink(const char *name) { ONE_PATH("unlink", AT_FDCWD, name, REAL(unlink)(name)); }
int unlinkat(int folder, const char *name, int flags) {
    ONE_PATH(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, name, REAL(unlinkat)(folder, name, flags));
}
int rmdir(const char *name) { ONE_PATH("rmdir", AT_FDCWD, name, REAL(rmdir)(name)); }
int mkdir(const char *name, mode_t mode) { ONE_PATH("mkdir", AT_FDCWD, name, REAL(mkdir)(name, mode)); }
int mkdirat(int folder, const char *name, mode_t mode) { ONE_PATH("mkdir", folder, name, REAL(mkdirat)(folder, name, mode)); }

#define TWO_PATHS(call, folder, name, other_folder, other_name, expression)                                            \
    char path[PATH_MAX], other[PATH_MAX];                                                                              \
    int first = path_at(folder, name, path), second = path_at(other_folder, other_name, other);                        \
    return second ? EVENT(call, first ? path : "/", other, 0L, expression) : (expression)
int rename(const char *name, const char *new) { TWO_PATHS("rename", AT_FDCWD, name, AT_FDCWD, new, REAL(rename)(name, new)); }
int renameat(int folder, const char *name, int to, const char *new) {
    TWO_PATHS("rename", folder, name, to, new, REAL(renameat)(folder, name, to, new));
}
int link(const char *name, const char *new) { TWO_PATHS("link", AT_FDCWD, name, AT_FDCWD, new, REAL(link)(name, new)); }
int linkat(int folder, const char *name, int to, const char *new, int flags) {
    TWO_PATHS("link", folder, name, to, new, REAL(linkat)(folder, name, to, new, flags));
}

/* Locks: flock, and fcntl with F_SETLK or F_SETLKW. */
int flock(int file, int operation) {
    char path[PATH_MAX];
    return path_of(file, path) ? READ("lock", path, REAL(flock)(file, operation)) : REAL(flock)(file, operation);
}

static int controlled(const char *name, int file, int command, void *argument) {
    char path[PATH_MAX];
    int (*call)(int, int, ...) = (int (*)(int, int, ...))real(name);
    if ((command == F_SETLK || command == F_SETLKW) && path_of(file, path))
        return READ("lock", path, call(file, command, argument));
    return call(file, command, argument);
}
#define ARGUMENT(after) ({ va_list rest; va_start(rest, after); void *a = va_arg(rest, void *); va_end(rest); a; })
int fcntl(int file, int command, ...) { return controlled("fcntl", file, command, ARGUMENT(command)); }
int fcntl64(int file, int command, ...) { return controlled("fcntl64", file, command, ARGUMENT(command)); }
