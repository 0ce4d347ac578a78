// The server behind nginx in the benchmark: net/http over a Unix socket.
//
// It does as little as a correct server can, so that what is measured beside the host is nginx and Go's own HTTP.
//
// usage: bench-gopeer SOCKET
package main

import (
	"bytes"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
)

var (
	hello = []byte("Hello, world!")
	mib   = bytes.Repeat([]byte("m"), 1<<20)
)

func put(w http.ResponseWriter, kind string, body []byte) {
	w.Header().Set("Content-Type", kind)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Write(body)
}

func echo(w http.ResponseWriter, r *http.Request) {
	if r.ContentLength < 0 || r.ContentLength > 1<<20 {
		http.Error(w, "bad body", http.StatusBadRequest)
		return
	}
	body := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(r.Body, body); err != nil {
		http.Error(w, "bad body", http.StatusBadRequest)
		return
	}
	put(w, "application/octet-stream", body)
}

// tunnel switches to a protocol of its own and sends back what it gets. Fronts pass on what follows as they do with WebSocket.
func tunnel(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Upgrade") != "echo" {
		http.Error(w, "no upgrade", http.StatusUpgradeRequired)
		return
	}
	connection, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer connection.Close()
	connection.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"))
	buffer := make([]byte, 64<<10)
	for {
		n, err := buffered.Read(buffer)
		if err != nil {
			return
		}
		if _, err := connection.Write(buffer[:n]); err != nil {
			return
		}
	}
}

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: bench-gopeer SOCKET")
	}
	listener, err := net.Listen("unix", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	http.HandleFunc("/bench/hello", func(w http.ResponseWriter, _ *http.Request) { put(w, "text/plain; charset=utf-8", hello) })
	http.HandleFunc("/bench/echo", echo)
	http.HandleFunc("/bench/tunnel", tunnel)
	http.HandleFunc("/bench/mib", func(w http.ResponseWriter, _ *http.Request) { put(w, "application/octet-stream", mib) })
	log.Fatal(http.Serve(listener, nil))
}
