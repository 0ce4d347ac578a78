/*
 * A peer of the host in the benchmark: FastCGI in C behind nginx, over a Unix socket.
 *
 * nginx keeps its connections, and libfcgi serves one connection a thread until it ends. So there are as many threads as
 * nginx may have connections: with fewer, a connection that is kept idle would hold a thread while requests wait for one.
 *
 * usage: bench-fastcgi SOCKET PROCESSES THREADS
 */
#include <fcgiapp.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20, BACKLOG = 4096, STACK = 128 * 1024 };

static char mib[MIB];

static void put(FCGX_Request *request, const char *status, const char *kind, const char *body, int length)
{
    FCGX_FPrintF(request->out, "Status: %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n", status, kind, length);
    FCGX_PutStr(body, length, request->out);
}

static void echo(FCGX_Request *request)
{
    const char *length_text = FCGX_GetParam("CONTENT_LENGTH", request->envp);
    int length = length_text ? atoi(length_text) : 0;
    char *body = length > 0 && length <= MIB ? malloc(length) : NULL;

    if (body && FCGX_GetStr(body, length, request->in) == length)
        put(request, "200 OK", "application/octet-stream", body, length);
    else
        put(request, "400 Bad Request", "text/plain", "bad body", 8);
    free(body);
}

static void *serve(void *unused)
{
    FCGX_Request request;

    (void)unused;
    FCGX_InitRequest(&request, 0, 0);
    while (FCGX_Accept_r(&request) == 0) {
        const char *path = FCGX_GetParam("DOCUMENT_URI", request.envp);

        if (path && !strcmp(path, "/bench/hello"))
            put(&request, "200 OK", "text/plain; charset=utf-8", "Hello, world!", 13);
        else if (path && !strcmp(path, "/bench/echo"))
            echo(&request);
        else if (path && !strcmp(path, "/bench/mib"))
            put(&request, "200 OK", "application/octet-stream", mib, MIB);
        else
            put(&request, "404 Not Found", "text/plain", "not found", 9);
        FCGX_Finish_r(&request);
    }
    return NULL;
}

static int work(int threads)
{
    pthread_attr_t attributes;
    pthread_t thread;

    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (FCGX_Init() != 0 || pthread_attr_init(&attributes) != 0 || pthread_attr_setstacksize(&attributes, STACK) != 0)
        return 1;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&thread, &attributes, serve, NULL) != 0)
            return 1;
    serve(NULL);
    return 1;
}

int main(int argc, char **argv)
{
    int processes, threads, listener;

    if (argc != 4 || (processes = atoi(argv[2])) < 1 || (threads = atoi(argv[3])) < 1)
        return 2;
    memset(mib, 'm', MIB);
    listener = FCGX_OpenSocket(argv[1], BACKLOG);
    if (listener < 0 || dup2(listener, 0) != 0)
        return 1;
    for (int i = 0; i < processes; i++)
        if (fork() == 0)
            _exit(work(threads));
    wait(NULL); /* none ends by itself: that one has, is a failure */
    return 1;
}
