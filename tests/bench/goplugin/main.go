// A peer of the host in the benchmark: hashicorp's go-plugin over gRPC, behind Go's net/http, in one program.
//
// Started with an address it is the host: it serves HTTP there, and starts itself again as the plugin. A request is one gRPC call,
// and all that travels is its body: no head, no routes. That is less than a real host would send, and in this peer's favour.
// The service is described by hand with a well-known message, so that no protobuf compiler is needed.
//
// usage: bench-goplugin ADDRESS:PORT
package main

import (
	"bytes"
	"context"
	"io"
	"io/ioutil"
	"log"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/golang/protobuf/ptypes/wrappers"
	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

const (
	service  = "bench.Handler"
	maxBytes = 1 << 20
	text     = "text/plain; charset=utf-8"
	binary   = "application/octet-stream"
)

var handshake = plugin.HandshakeConfig{ProtocolVersion: 1, MagicCookieKey: "BENCH_GOPLUGIN", MagicCookieValue: "handler"}

var plugins = map[string]plugin.Plugin{"handler": &handler{}}

// What the plugin answers, by the name of the call.
var answers = map[string]func([]byte) []byte{
	"hello": func([]byte) []byte { return []byte("Hello, world!") },
	"echo":  func(body []byte) []byte { return body },
	"mib": func() func([]byte) []byte {
		mib := bytes.Repeat([]byte("m"), maxBytes)
		return func([]byte) []byte { return mib }
	}(),
}

// The plugin as go-plugin wants it described, on both sides.
type handler struct{ plugin.NetRPCUnsupportedPlugin }

func (*handler) GRPCServer(_ *plugin.GRPCBroker, server *grpc.Server) error {
	description := grpc.ServiceDesc{ServiceName: service, HandlerType: (*interface{})(nil)}
	for name, answer := range answers {
		answer := answer
		description.Methods = append(description.Methods, grpc.MethodDesc{
			MethodName: name,
			Handler: func(_ interface{}, _ context.Context, decode func(interface{}) error, _ grpc.UnaryServerInterceptor) (interface{}, error) {
				in := new(wrappers.BytesValue)
				if err := decode(in); err != nil {
					return nil, err
				}
				return &wrappers.BytesValue{Value: answer(in.Value)}, nil
			},
		})
	}
	server.RegisterService(&description, struct{}{})
	return nil
}

func (*handler) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, connection *grpc.ClientConn) (interface{}, error) {
	return connection, nil
}

func route(connection *grpc.ClientConn, name, kind string) {
	method := "/" + service + "/" + name
	http.HandleFunc("/bench/"+name, func(w http.ResponseWriter, r *http.Request) {
		var in, out wrappers.BytesValue
		if r.ContentLength != 0 {
			body, err := ioutil.ReadAll(io.LimitReader(r.Body, maxBytes))
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			in.Value = body
		}
		if err := connection.Invoke(r.Context(), method, &in, &out); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		w.Header().Set("Content-Type", kind)
		w.Header().Set("Content-Length", strconv.Itoa(len(out.Value)))
		w.Write(out.Value)
	})
}

func main() {
	if os.Getenv(handshake.MagicCookieKey) == handshake.MagicCookieValue {
		plugin.Serve(&plugin.ServeConfig{HandshakeConfig: handshake, Plugins: plugins, GRPCServer: plugin.DefaultGRPCServer})
		return
	}
	if len(os.Args) != 2 {
		log.Fatal("usage: bench-goplugin ADDRESS:PORT")
	}
	command := exec.Command(os.Args[0])
	// However this host ends, its plugin ends with it.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: handshake, Plugins: plugins, Cmd: command, AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Logger: hclog.New(&hclog.LoggerOptions{Output: os.Stderr, Level: hclog.Error}),
	})
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		client.Kill()
		os.Exit(0)
	}()
	protocol, err := client.Client()
	if err != nil {
		log.Fatal(err)
	}
	connection, err := protocol.Dispense("handler")
	if err != nil {
		log.Fatal(err)
	}
	route(connection.(*grpc.ClientConn), "hello", text)
	route(connection.(*grpc.ClientConn), "echo", binary)
	route(connection.(*grpc.ClientConn), "mib", binary)
	log.Fatal(http.ListenAndServe(os.Args[1], nil))
}
