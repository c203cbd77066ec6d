// Probe is the server that network tests run in containers: HTTP on one port ("/" says who answers, "/addr" who asks),
// and on port 7 an echo, by TCP and UDP.
//
//	probe [PORT]
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
)

func main() {
	port := "80"
	if len(os.Args) > 1 {
		port = os.Args[1]
	}
	name, err := os.Hostname()
	if err != nil {
		log.Fatal(err)
	}
	go echoStreams()
	go echoPackets()
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "hello from", name) })
	http.HandleFunc("/addr", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, netip.MustParseAddrPort(r.RemoteAddr).Addr().Unmap())
	})
	log.Fatal(http.ListenAndServe(":"+port, nil))
}

func echoStreams() {
	l, err := net.Listen("tcp", ":7")
	if err != nil {
		log.Print(err) // in the host's network another one may have it
		return
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn)
		}()
	}
}

func echoPackets() {
	conn, err := net.ListenPacket("udp", ":7")
	if err != nil {
		log.Print(err)
		return
	}
	packet := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(packet)
		if err != nil {
			log.Fatal(err)
		}
		_, _ = conn.WriteTo(packet[:n], from)
	}
}
