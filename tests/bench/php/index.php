<?php
// The application of php-fpm in the benchmark: the same answers as the others.

switch ($_SERVER['REQUEST_URI']) {
    case '/bench/hello':
        $kind = 'text/plain; charset=utf-8';
        $body = 'Hello, world!';
        break;
    case '/bench/echo':
        $kind = 'application/octet-stream';
        $body = file_get_contents('php://input');
        break;
    default:
        $kind = 'text/plain; charset=utf-8';
        $body = 'not found';
        http_response_code(404);
}
header('Content-Type: ' . $kind);
header('Content-Length: ' . strlen($body));
echo $body;
