/* A server's wall clock, off by as many seconds as stand in the file that WALL_CLOCK names; preloaded (clocks.py).
 *
 * The file holds one 64-bit number. It is mapped once, so a change is seen at once and costs no system call.
 * Redis takes the time of day from gettimeofday, and durations from another clock, which stays as it is.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile const int64_t *seconds_ahead;

__attribute__((constructor)) static void map_seconds(void) {
    const char *path = getenv("WALL_CLOCK");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file >= 0) {
        void *page = mmap(NULL, sizeof *seconds_ahead, PROT_READ, MAP_SHARED, file, 0);
        if (page != MAP_FAILED) seconds_ahead = page;
    }
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec here;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &here);
    now->tv_sec = here.tv_sec + (seconds_ahead ? *seconds_ahead : 0);
    now->tv_usec = here.tv_nsec / 1000;
    return 0;
}
